"""transformers' own tests of models and generation, run with a tiny hybrid.

`make test` downloads transformers' source package (tests/transformers_source.txt), which holds its tests of models. Its tests
of generation and of exporting programs are in its repository alone: HYLO_TRANSFORMERS_CHECKOUT names a checkout of the same
version (`git clone --branch v5.17.0 https://github.com/huggingface/transformers`), with which they run too.
"""

import importlib
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_hylo.hf import (
    HyloCache,
    HyloConfig,
    HyloForCausalLM,
    HyloForQuestionAnswering,
    HyloForSequenceClassification,
    HyloForTokenClassification,
    HyloModel,
)
from tests.hf.conftest import serve_config

SOURCE = Path(os.environ.get("HYLO_TRANSFORMERS_CHECKOUT") or Path(sys.prefix, "transformers-source"))
if not (SOURCE / "tests" / "test_modeling_common.py").is_file():
    pytest.skip(
        f"no tests of transformers in {SOURCE}: run make .venv/transformers-source/unpacked, which needs the package registry, "
        "or set HYLO_TRANSFORMERS_CHECKOUT to a checkout",
        allow_module_level=True,
    )


def absent(name: str) -> type:
    """Stand-in for a mixin that is not in the source package: one test, which says so and is skipped."""

    def skipped(self: unittest.TestCase) -> None:
        self.skipTest(f"{name} is not in transformers' source package: set HYLO_TRANSFORMERS_CHECKOUT to a checkout")

    return type(name, (), {f"test_{name}": skipped})


def module_of_transformers(name: str = "") -> types.ModuleType:
    """Make an empty module of its package `tests`, called transformers_tests here, as this project has one `tests` too."""
    module = sys.modules[f"transformers_tests{name}"] = types.ModuleType(f"transformers_tests{name}")
    module.__path__ = [str(SOURCE / "tests")]
    return module


module_of_transformers()
for name, mixin in (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", "GenerationTesterMixin")):
    if not (SOURCE / "tests" / f"{name.replace('.', '/')}.py").is_file():
        module_of_transformers(f".{name.split('.')[0]}")
        setattr(module_of_transformers(f".{name}"), mixin, absent(mixin))
    elif name == "exporters.test_export":  # which its tests of generation import by its own name, `tests.exporters.test_export`
        for module in ("exporters", name):
            sys.modules[f"tests.{module}"] = importlib.import_module(f"transformers_tests.{module}")
common = importlib.import_module("transformers_tests.test_modeling_common")


class Tester:
    """Tiny configuration and inputs, under the names that the mixins read."""

    batch_size, seq_length, is_training = 5, 7, True
    vocab_size, hidden_size, num_attention_heads = 160, 48, 4

    def __init__(self, mixers: str) -> None:
        self.mixers, self.num_hidden_layers = mixers, len(mixers)

    def get_config(self) -> HyloConfig:
        settings = serve_config(self.mixers).to_dict()
        return HyloConfig(hylo=settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestHybrid(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    """A layer of every mixer."""

    all_model_classes = (
        HyloModel,
        HyloForCausalLM,
        HyloForSequenceClassification,
        HyloForTokenClassification,
        HyloForQuestionAnswering,
    )

    def setUp(self) -> None:
        self.model_tester = Tester("*+GMK")
        # models outside transformers are in none of the lists by which its tests choose labels and skip the backbone
        for kind, name in (
            ("MODEL", "HyloModel"),
            ("MODEL_FOR_CAUSAL_LM", "HyloForCausalLM"),
            ("MODEL_FOR_SEQUENCE_CLASSIFICATION", "HyloForSequenceClassification"),
            ("MODEL_FOR_TOKEN_CLASSIFICATION", "HyloForTokenClassification"),
            ("MODEL_FOR_QUESTION_ANSWERING", "HyloForQuestionAnswering"),
        ):
            self.enterContext(mock.patch.dict(getattr(common, f"{kind}_MAPPING_NAMES"), hylo=name))

    @unittest.skip("the hybrid's tensors keep their names; conversions that other tests have registered are not its own")
    def test_reverse_loading_mapping(self) -> None:
        """Skipped."""

    @unittest.skip("two layers at most are allowed there; here is one of each mixer")
    def test_num_layers_is_small(self) -> None:
        """Skipped."""

    def test_attention_outputs(self) -> None:
        """As many attentions as layers are asked for: an attention and an MLA layer, without recurrent ones."""
        self.model_tester = Tester("*+")
        super().test_attention_outputs()

    def test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions(self) -> None:
        """Not skipped: transformers' own heads do not list `output_attentions`, which they pass on."""
        self.all_model_classes = self.all_model_classes[:2]
        super().test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions()

    def test_recurrent_layers_mask_padding_on_continued_forward(self) -> None:
        """Not skipped: a HyLo configuration names its layers by a pattern."""
        if not hasattr(super(), self._testMethodName):
            self.skipTest("not in transformers' source package")
        with mock.patch.object(
            HyloConfig, "layer_types", ["linear_attention"] * self.model_tester.num_hidden_layers, create=True
        ):
            super().test_recurrent_layers_mask_padding_on_continued_forward()

    def _check_outputs_close(self, actual, expected, **bounds) -> None:
        """A program keeps a mask and positions of each sequence, where the model looks what they say, and no spare rows."""
        kept = {f"past_key_values.{name}" for name in ("padding", "positions")} - expected.keys()
        actual = {name: actual[name] for name in actual.keys() - kept}
        if (last := "past_key_values.last_position") in expected:
            expected = expected | {last: expected[last].expand_as(actual[last])}
        rows = {name for name in actual if name.startswith("past_key_values.rows.")}
        expected = expected | {name: expected[name][:, : actual[name].shape[1]] for name in rows}
        super()._check_outputs_close(actual, expected, **bounds)

    def test_can_init_all_missing_weights(self) -> None:
        """Not skipped as one of an old model: its age is read from the licence in the configuration's file."""
        with tempfile.NamedTemporaryFile("w") as file:
            print("# Copyright 2026", file=file, flush=True)
            with mock.patch.object(common.inspect, "getfile", return_value=file.name):
                super().test_can_init_all_missing_weights()

    # where tests look into a cache, it is a HyloCache
    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config) -> None:
        assert isinstance(past_key_values, HyloCache)
        assert (past_key_values.batch_size, past_key_values.get_seq_length()) == (batch_size, seq_length)

    def _check_caches_are_equal(self, one, other) -> None:
        for held, expected in ((one.tokens, other.tokens), (one.states, other.states)):
            assert held.keys() == expected.keys()
            for layer, tensors in held.items():
                torch.testing.assert_close(tensors, expected[layer])
