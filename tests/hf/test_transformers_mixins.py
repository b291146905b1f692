"""transformers' own tests of models and generation, run with a tiny hybrid; they need a checkout of transformers.

HYLO_TRANSFORMERS_CHECKOUT names it
(`git clone --branch v5.17.0 https://github.com/huggingface/transformers`); the package
parameterized is needed too. Without it everything here is skipped; the tests beside this file hold what these found.
"""

import importlib.util
import os
import sys
import unittest
from pathlib import Path

import pytest
import torch

from megatron_hylo.hf import HyloCache, HyloConfig, HyloForCausalLM, HyloModel
from tests.hf.conftest import serve_config

CHECKOUT = os.environ.get("HYLO_TRANSFORMERS_CHECKOUT")
if not CHECKOUT:
    pytest.skip("set HYLO_TRANSFORMERS_CHECKOUT to a checkout of transformers to run its tests", allow_module_level=True)


def load_tests_of_transformers(checkout: Path) -> None:
    """Import the checkout's package `tests` under another name, as this project has one too."""
    folder = checkout / "tests"
    spec = importlib.util.spec_from_file_location(
        "transformers_tests", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["transformers_tests"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["transformers_tests"])


load_tests_of_transformers(Path(CHECKOUT))
common = importlib.import_module("transformers_tests.test_modeling_common")


class Tester:
    """Tiny configuration and inputs, under the names that the mixins read."""

    batch_size, seq_length, is_training = 5, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 160, 48, 2, 4
    mixers = "G+"

    def get_config(self) -> HyloConfig:
        settings = serve_config(self.mixers).to_dict()
        return HyloConfig(hylo=settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# models outside transformers are in none of the lists by which its tests choose labels and skip the backbone
common.MODEL_MAPPING_NAMES["hylo"] = "HyloModel"
common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["hylo"] = "HyloForCausalLM"


class Mixins(common.ModelTesterMixin, common.GenerationTesterMixin):
    """All tests of transformers, with a HyloCache where they look into a cache."""

    all_model_classes = (HyloModel, HyloForCausalLM)
    tester: type[Tester] = Tester

    def setUp(self) -> None:
        self.model_tester = self.tester()

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config) -> None:
        assert isinstance(past_key_values, HyloCache)
        assert (past_key_values.batch_size, past_key_values.get_seq_length()) == (batch_size, seq_length)

    def _check_caches_are_equal(self, one, other) -> None:
        for held, expected in ((one.tokens, other.tokens), (one.states, other.states)):
            assert held.keys() == expected.keys()
            for layer, tensors in held.items():
                torch.testing.assert_close(tensors, expected[layer])


class TestAttention(Mixins, unittest.TestCase):
    """An MLA layer and an attention layer, both of which have probabilities."""

    tester = type("Tester", (Tester,), {"mixers": "+*"})


class TestRecurrent(Mixins, unittest.TestCase):
    """A Gated DeltaNet layer and an MLA layer."""

    has_attentions = False  # fewer than layers


class TestOtherRecurrent(Mixins, unittest.TestCase):
    """A Mamba2 layer and a KDA layer."""

    has_attentions = False
    tester = type("Tester", (Tester,), {"mixers": "MK"})
