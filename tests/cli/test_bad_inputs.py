"""Mistyped, misplaced and damaged input gives one sentence on stderr, the right exit code, and leaves nothing behind.

To add a case, add a row to `CASES`: (command line, words of the sentence). It runs in a folder with the files of `material`. A
third entry is the exit code where it is not 2.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from megatron_hylo.cli.main import main
from megatron_hylo.data.preprocess import build_dataset
from megatron_hylo.models.checkpoint import save_model
from megatron_hylo.models.hylo_model import build_model
from tests.calibrate.conftest import make_text
from tests.conftest import tiny_config, tiny_hf_model
from tests.data.conftest import tokenizer  # noqa: F401  the fixture

TRAIN = "train --stage pretrain --data data --model model --output new --precision fp32 --sequence_length 16"
DISTIL = "train --stage distil --data data --model hybrid --teacher model --output new --precision fp32 --sequence_length 16"
CASES: list[tuple] = [
    # the command line itself
    ("", "needs a verb: quickstart, layouts"),
    ("trian", "hylo has no verb trian; did you mean train?"),
    ("upcylce model new", "did you mean upcycle?"),
    ("--foo", "hylo has no option --foo"),
    ("--versoin", "did you mean --version?"),
    ("layouts --jsn", "hylo layouts has no option --jsn; did you mean --json?"),
    ("layouts extra", "hylo layouts takes no further value, got extra"),
    ("convert", "hylo convert needs SOURCE, OUTPUT"),
    ("convert hf", "hylo convert needs OUTPUT"),
    ("convert hf new hf", "takes no further value, got hf"),
    ("convert hf new --to hff", "--to must be megatron or hf, got hff; did you mean hf?"),
    ("convert hf new --overwrite true", "switches such as --overwrite take none"),
    ("convert hf new --overwrite=true", "--overwrite is a switch and takes no value"),
    ("convert hf new --overwrit", "did you mean --overwrite?"),
    ("generate model --prompt words", "hylo generate takes PROMPT without --prompt, in the order MODEL PROMPT"),
    ("fetch", "hylo fetch needs WHAT"),
    ("fetch techer", "unseen, manuals, qwen3-tokenizer, got techer; did you mean teacher?"),
    ("evaluate model", "hylo evaluate needs DATA"),
    ("evaluate model data --windows many", "--windows must be an integer above 0, got many"),
    ("evaluate model data --windows", "--windows needs a value: an integer"),
    ("evaluate model data --window 3", "did you mean --windows?"),
    ("evaluate model data --sequence-length 16", "did you mean --sequence_length?"),
    ("generate model", "hylo generate needs PROMPT"),
    ("generate model hello --temperature warm", "--temperature must be a number, got warm"),
    ("preprocess text.jsonl new", "hylo preprocess needs --tokenizer"),
    ("preprocess text.jsonl new --tokenizer hf --heldout_fraction half", "--heldout_fraction must be a number, got half"),
    ("select model --mla mla --linear linear --data data", "hylo select needs --count"),
    ("upcycle model", "hylo upcycle needs OUTPUT"),
    ("upcycle model new --rotary fastets", "got fastets; did you mean fastest?"),
    ("upcycle model new --overrides zz", "--overrides must be a mapping"),
    ("upcycle model new --overrides '{kv_lora_rank: many}'", "--overrides must be a mapping"),
    ("doctor --precision fp16", "--precision must be"),
    ("quickstart --linear gnd", "--linear must be gdn or mamba2, got gnd; did you mean gdn?"),
    ("train", "hylo train needs --stage, --data, --output"),
    (f"{TRAIN} --lr 1e-4", "hylo train has no option --lr; did you mean --optimizer.lr?"),
    (f"{TRAIN} --optimzer.lr 1e-4", "did you mean --optimizer.lr?"),
    (f"{TRAIN} --optimizer.lrr=1e-4", "did you mean --optimizer.lr?"),
    (f"{TRAIN} --optimizer.lr fast", "--optimizer.lr must be a number, got fast"),
    (f"{TRAIN} --stage pretrian", "got pretrian; did you mean pretrain?"),
    (f"{TRAIN} --seed", "--seed needs a value: an integer"),
    (f"{TRAIN} --seed 1.5", "--seed must be an integer, got 1.5"),
    (f"{TRAIN} --deterministic", "--deterministic needs a value: true or false"),
    (f"{TRAIN} extra", "takes no further value, got extra"),
    (f"{TRAIN} --parallel.tensor_model_parallel_size two", "must be an integer, got two"),
    (f"{TRAIN} --tensor_model_parallel_size 2", "did you mean --parallel.tensor_model_parallel_size?"),
    (f"{TRAIN} --tensorboard false", "logging.tensorboard"),
    # recipes
    ("train --config nowhere.yaml", "file does not exist"),
    ("train --config model", "path is not a file"),
    ("train --config broken.yaml", "broken.yaml:3: not YAML: while parsing a flow sequence"),
    ("train --config tab.yaml", "tab.yaml:2: not YAML"),
    ("train --config key.yaml", "key.yaml:3: unknown key modle; did you mean model?"),
    ("train --config nested.yaml", "nested.yaml:5: unknown key optimizer.lrr; did you mean optimizer.lr?"),
    ("train --config value.yaml", "value.yaml:3: seed must be an integer, got soon"),
    ("train --config choice.yaml", "choice.yaml:1: stage must be one of pretrain, align, distil, got pretrian"),
    ("train --config null.yaml", "null.yaml:5: optimizer.lr is null; give a value, or leave it out for its default 6e-05"),
    ("train --config rates.yaml --config null.yaml", "null.yaml:5: optimizer.lr is null"),
    ("train --config rates.yaml --optimizer '{\"lr\": null}'", "optimizer.lr is null; give a value"),
    ("train --config group.yaml", "group.yaml:3: optimizer must be a mapping of settings, got 3"),
    ("train --config scaling.yaml", "scaling.yaml:3: rope_scaling.factor is null"),
    ("train --config scaling_value.yaml", "scaling_value.yaml:5: rope_scaling.factor must be a number, got far"),
    ("train --config scaling_null.yaml", "scaling_null.yaml:3: rope_scaling.attention_factor must be a number or null, got x"),
    ("train --config scaling_key.yaml", "scaling_key.yaml:5: unknown key rope_scaling.factors; did you mean"),
    ("train --config scaling_word.yaml", "scaling_word.yaml:3: rope_scaling must be a mapping or null, got yarn"),
    ("train --config window.yaml", "window.yaml:6: teacher_window.rope_scaling.factor must be a number, got far"),
    ("train --config window_key.yaml", "window_key.yaml:5: unknown key teacher_window.rope_scaling.factors"),
    ("train --config blend.yaml", "blend.yaml:4: text.blend.weight must be a number, got heavy"),
    ("train --config blend_key.yaml", "blend_key.yaml:4: unknown key text.blend.weigh; did you mean text.blend.weight?"),
    ("train --config blend_null.yaml", "text.blend.weight is null; give a value"),
    (f"{TRAIN} --recall.tasks [passkeys,counting]", "variable_chain, passkey, counting, got passkeys; did you mean passkey?"),
    (f"{TRAIN} --rope_scaling.factor far", "--rope_scaling.factor must be a number, got far"),
    (f"{TRAIN} --rope_scaling '{{factor: far}}'", "--rope_scaling.factor must be a number, got far"),
    (f"{TRAIN} --rope_scaling.rope_type yran", "--rope_scaling.rope_type must be one of none, linear, llama3, yarn"),
    (f"{TRAIN} --rope_scaling.facto 2", "hylo train has no option --rope_scaling.facto; did you mean --rope_scaling.factor?"),
    (f"{TRAIN} --rope_scaling.rope_type yarn --rope_scaling.factor 0.5", "rope_scaling: yarn needs factor >= 1, got 0.5"),
    ("train --config list.yaml", "list.yaml holds no settings"),
    ("train --config empty.yaml", "empty.yaml holds no settings"),
    ("train --config latin.yaml", "is not UTF-8: latin.yaml"),
    ("train --config missing.yaml", "hylo train needs --data"),
    ("upcycle --config key.yaml", "unknown key"),
    ("upcycle --config seed.yaml", "hylo upcycle needs OUTPUT"),
    # settings that cannot work
    (f"{TRAIN} --sequence_length 0", "sequence_length must be at least 1, got 0"),
    (f"{TRAIN} --micro_batch_size -1", "micro_batch_size must be at least 1, got -1"),
    (f"{TRAIN} --train_tokens 0", "train_tokens must be at least 1, got 0"),
    (f"{TRAIN} --logging.log_interval 0", "log_interval must be at least 1"),
    (f"{TRAIN} --checkpoint.save_interval 0", "save_interval must be at least 1"),
    (f"{TRAIN} --checkpoint.keep 0", "keep must be at least 1"),
    (f"{TRAIN} --global_batch_size 3 --micro_batch_size 2", "global_batch_size 3 must be a multiple of micro_batch_size 2"),
    (f"{TRAIN} --recompute maybe", "recompute"),
    (f"{TRAIN} --teacher model", "stage pretrain learns from text alone"),
    (f"{TRAIN} --scratch smollm2-135m", "needs either model"),
    (f"{TRAIN} --second_model model", "second_model is for stage align alone"),
    (f"{TRAIN} --linear_precision fp8", "linear_precision fp8 needs precision bf16"),
    (f"{TRAIN} --parallel.tensor_model_parallel_size 2", "start a multiple of 2 ranks"),
    (f"{TRAIN} --parallel.tensor_model_parallel_size 0", "tensor_model_parallel_size"),
    (f"{DISTIL} --distil.kl_temperature 0", "kl_temperature must be positive, got 0"),
    (f"{DISTIL} --distil.kl_top_k 0", "kl_top_k must be at least 1"),
    ("train --stage distil --data data --model hybrid --output new", "stage distil needs both model and teacher"),
    (f"{DISTIL} --teacher_store store --teacher_address 1", "two places of the same teacher"),
    ("evaluate model data --windows 0", "--windows must be an integer above 0, got 0"),
    ("evaluate model data --windows -3", "--windows must be an integer above 0, got -3"),
    ("evaluate model data --sequence_length 0", "--sequence_length must be an integer above 0, got 0"),
    ("evaluate model data --sequence_length -5", "--sequence_length must be an integer above 0, got -5"),
    ("evaluate model data --sequence_length 100000", "document"),
    ("generate model hello --max_new_tokens 0", "--max_new_tokens must be an integer above 0, got 0"),
    ("generate model hello --max_new_tokens -1", "--max_new_tokens must be an integer above 0, got -1"),
    ("generate model hello --temperature -1", "temperature >= 0"),
    ("generate model hello --top_p 0", "top_p <= 1"),
    ("generate model hello --top_p 2", "top_p <= 1"),
    ("generate model hello --repetition_penalty 0", "repetition_penalty > 0"),
    ("generate model ''", "prompt is empty"),
    ("plan model", "is a model folder; give a recipe or a layout, and the folder as --student"),
    ("compare model model --output page.txt", "--output page.txt must be an .html file"),
    ("generate model hello --batch 2", 'line 1 of the prompts is not JSON: Expecting value'),
    ("generate model '[3]' --batch 2", 'line 1 of the prompts is no string and no object with a string "prompt"'),
    ("generate model ' ' --batch 2", "there are no prompts"),
    ("generate model '{\"prompt\": \"\"}' --batch 2", "prompt is empty"),
    ("generate model hello --batch 0", "--batch must be an integer above 0 or null, got 0"),
    ("generate model hello --chat", "no chat template"),
    ("verify hf model --tokens 0", "--tokens must be an integer above 0, got 0"),
    ("verify hf model --tokens -2", "--tokens must be an integer above 0, got -2"),
    ("preprocess text.jsonl new --tokenizer hf --heldout_fraction 1.5", "heldout_fraction"),
    ("preprocess text.jsonl new --tokenizer hf --heldout_fraction -1", "heldout_fraction"),
    ("calibrate model data new --tokens 0", "--tokens must be an integer above 0, got 0"),
    ("calibrate model data new --tokens -1", "--tokens must be an integer above 0, got -1"),
    ("calibrate model data new --sequence_length 0", "--sequence_length must be an integer above 0, got 0"),
    ("calibrate model data new --tensor_model_parallel_size 2", "ranks"),
    ("calibrate model data new --tensor_model_parallel_size 0", "must be an integer above 0, got 0"),
    ("cache-teacher model data new --kl 0", "--kl must be a number above 0, got 0"),
    ("cache-teacher model data new --kl -1", "--kl must be a number above 0, got -1"),
    ("cache-teacher model data new --sequence_length 0", "--sequence_length must be an integer above 0, got 0"),
    ("cache-teacher model data new --overlap 5000", "overlap"),
    ("cache-teacher model data new --micro_batch_size 0", "--micro_batch_size must be an integer above 0, got 0"),
    ("upcycle model new", "give either a layout name or a pattern, not neither"),
    ("upcycle model new --pattern GGG --layout smollm2-135m", "give either a layout name or a pattern, not both"),
    ("upcycle model new --pattern GXG --init paper", "X"),
    ("upcycle model new --pattern GG --init paper", "3"),
    ("upcycle model new --pattern GGG", "needs --calibration"),
    ("upcycle model new --pattern GGG --init papr", "papr"),
    ("upcycle model new --layout nothing", "nothing"),
    ("upcycle model new --layout smollm2-135m-8mla22gdn --init paper", "the teacher"),
    ("upcycle model new --pattern GGG --init paper --overrides '{nothing: 3}'", "nothing"),
    ("upcycle model new --pattern +++ --init paper --overrides '{kv_lora_rank: -3}'", "kv_lora_rank"),
    ("assemble mla linear model new --pattern G+X", "X"),
    ("assemble linear mla model new --pattern G+G", "pure-MLA"),
    ("select model --mla mla --linear linear --data data --count 0", "--count must be an integer above 0, got 0"),
    ("select model --mla mla --linear linear --data data --count 3", "between 1 and 2"),
    ("select model --mla mla --linear linear --data data --count 1 --tokens 3", "less than one window"),
    ("select model --mla linear --linear mla --data data --count 1", "select needs a model of MLA layers"),
    ("doctor --layout nothing", "nothing"),
    ("serve-teacher model 127.0.0.1:99999", "99999"),
    ("serve-teacher model 127.0.0.1:port", "port"),
    ("serve-teacher model somewhere:else:1", "somewhere"),
    # paths
    ("convert nowhere new", "nowhere does not exist; give a Hugging Face folder or a .gguf file"),
    ("convert meta-llama/Llama-3.2-1B new", "`hf download meta-llama/Llama-3.2-1B --local-dir FOLDER` fetches it"),
    ("convert hf model", "already exists; choose another place, remove it, or replace it with --overwrite"),
    ("scripts model", "already exists"),
    ("convert hf file", "file"),
    ("convert hf file/new", "file is a file"),
    ("convert hf hf --overwrite", "hf"),
    ("convert hf new --to hf", "hf"),
    ("convert model new", "model"),
    ("convert empty new", "empty is not a Hugging Face folder: it has no config.json; give the folder that has"),
    ("convert file new", "file"),
    ("convert '' new", "lies in what is read (.)"),
    ("convert hf /proc/nowhere/new", "no such file or directory"),
    ("convert ~nobody-of-that-name/hf new", "there is no such home folder"),
    ("export nowhere new", "nowhere"),
    ("export hf new", "hf"),
    ("verify hf nowhere", "nowhere"),
    ("verify nowhere model", "nowhere"),
    ("evaluate nowhere data", "nowhere"),
    ("evaluate model nowhere", "nowhere"),
    ("evaluate model model", "model"),
    ("evaluate hf data --sequence_length 16", "hf"),
    ("evaluate model data --teacher nowhere --sequence_length 16", "nowhere"),
    ("generate nowhere hello", "nowhere"),
    ("generate data hello", "data"),
    ("generate empty hello", "empty"),
    ("preprocess nowhere new --tokenizer hf", "nowhere"),
    ("preprocess empty new --tokenizer hf", "empty"),
    ("preprocess text.jsonl new --tokenizer nowhere", "nowhere"),
    ("preprocess text.jsonl data --tokenizer hf", "already exists"),
    ("preprocess file new --tokenizer hf", "file"),
    ("calibrate nowhere data new", "nowhere"),
    ("calibrate model nowhere new", "nowhere"),
    ("calibrate hybrid data new --sequence_length 16 --tokens 64", "attention"),
    ("cache-teacher nowhere data new", "nowhere"),
    ("cache-teacher model nowhere new --sequence_length 16", "nowhere"),
    ("upcycle nowhere new --pattern GGG --init paper", "nowhere"),
    ("upcycle model new --pattern GGG --calibration nowhere", "nowhere"),
    ("upcycle hybrid new --pattern GGG --init paper", "attention"),
    ("upcycle model model --pattern GGG --init paper --overwrite", "model is what is read"),
    ("assemble nowhere linear model new --pattern G+G", "nowhere"),
    ("select nowhere --mla mla --linear linear --data data --count 1", "nowhere"),
    ("serve-teacher nowhere 127.0.0.1:29617", "nowhere"),
    (TRAIN.replace("--model model", "--model nowhere"), "nowhere"),
    (TRAIN.replace("--data data", "--data nowhere"), "nowhere"),
    (TRAIN.replace("--output new", "--output file"), "file"),
    (TRAIN.replace("--model model", "--scratch nothing"), "nothing"),
    (DISTIL.replace("--teacher model", "--teacher nowhere"), "nowhere"),
    (DISTIL.replace("--teacher model", "--teacher_store nowhere"), "nowhere"),
    # damaged files
    ("convert cut new", "safetensors"),
    ("convert noweights new", "noweights"),
    ("convert badjson new", "config.json"),
    ("evaluate damaged data --sequence_length 16", "sha256"),
    ("generate damaged hello", "sha256"),
    ("upcycle damaged new --pattern GGG --init paper", "sha256"),
    ("evaluate nojson data --sequence_length 16", "hylo.json"),
]  # fmt: skip
RECIPES = {
    "broken.yaml": "stage: pretrain\ndata: [a\nmodel: x\n",
    "tab.yaml": "stage: pretrain\n\tdata: a\n",
    "key.yaml": "stage: pretrain\ndata: a\nmodle: x\noutput: new\n",
    "nested.yaml": "stage: pretrain\ndata: a\noutput: new\noptimizer:\n  lrr: 3\n",
    "value.yaml": "stage: pretrain\ndata: a\nseed: soon\noutput: new\n",
    "choice.yaml": "stage: pretrian\ndata: a\noutput: new\n",
    "rates.yaml": "stage: pretrain\ndata: a\noutput: new\noptimizer: {lr: 1.0}\n",
    "null.yaml": "stage: pretrain\ndata: a\noutput: new\noptimizer:\n  lr:\n",
    "group.yaml": "stage: pretrain\ndata: a\noptimizer: 3\noutput: new\n",
    "scaling.yaml": "stage: pretrain\ndata: a\nrope_scaling: {factor: null}\noutput: new\n",
    "scaling_value.yaml": "stage: pretrain\ndata: a\nrope_scaling:\n  rope_type: yarn\n  factor: far\noutput: new\n",
    "scaling_null.yaml": "stage: pretrain\ndata: a\nrope_scaling: {factor: 2, attention_factor: x}\noutput: new\n",
    "scaling_key.yaml": "stage: pretrain\ndata: a\nrope_scaling:\n  rope_type: yarn\n  factors: 2\noutput: new\n",
    "scaling_word.yaml": "stage: pretrain\ndata: a\nrope_scaling: yarn\noutput: new\n",
    "window.yaml": "stage: distil\ndata: a\nteacher_window:\n  mode: rope\n  rope_scaling:\n    factor: far\noutput: new\n",
    "window_key.yaml": "stage: distil\ndata: a\nteacher_window:\n  rope_scaling:\n    factors: 2\noutput: new\n",
    "blend.yaml": "stage: pretrain\ndata: a\ntext:\n  blend:\n  - {data: a, weight: heavy}\noutput: new\n",
    "blend_key.yaml": "stage: pretrain\ndata: a\ntext:\n  blend:\n  - {data: a, weigh: 2}\noutput: new\n",
    "blend_null.yaml": "stage: pretrain\ndata: a\ntext:\n  blend:\n  - {data: a, weight: null}\noutput: new\n",
    "list.yaml": "- a\n- b\n",
    "empty.yaml": "",
    "missing.yaml": "stage: pretrain\ndata: null\noutput: new\n",
    "seed.yaml": "teacher: model\nseed: 3\n",
}


@pytest.fixture(scope="module")
def material(one_rank, tmp_path_factory, tokenizer) -> Path:  # noqa: F811
    """A folder with a Hugging Face model, model folders, a dataset, recipes with mistakes and damaged copies."""
    root = tmp_path_factory.mktemp("bad")
    tiny_hf_model("llama", vocab_size=304).save_pretrained(root / "hf")
    tokenizer.save_pretrained(root / "hf")
    for name, pattern in (("model", "*-*-*-"), ("mla", "+-+-+-"), ("linear", "G-G-G-"), ("hybrid", "G-+-G-")):
        save_model(build_model(tiny_config(pattern, vocab_size=304)), root / name, root / "hf", {"stage": "align"})
    build_dataset(make_text(30), tokenizer, root / "data", heldout_fraction=0.2)
    (root / "text.jsonl").write_text(json.dumps({"text": "some words " * 30}) + "\n")
    for name, text in RECIPES.items():
        (root / name).write_text(text)
    (root / "latin.yaml").write_bytes("stage: pretrain\ndata: é\n".encode("latin-1"))
    (root / "file").write_text("not a folder")
    (root / "empty").mkdir()
    for name in ("cut", "noweights", "badjson"):
        shutil.copytree(root / "hf", root / name)
    cut = root / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:1000])
    (root / "noweights" / "model.safetensors").unlink()
    (root / "badjson" / "config.json").write_text("{")
    shutil.copytree(root / "model", root / "damaged")
    shard = max((root / "damaged").rglob("*.distcp"), key=lambda file: file.stat().st_size)
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    shutil.copytree(root / "model", root / "nojson")
    (root / "nojson" / "hylo.json").unlink()
    return root


def files(root: Path) -> set[tuple[Path, int]]:
    """Every path below a folder, with its time of change."""
    return {(path, path.lstat().st_mtime_ns if path.is_file() else 0) for path in root.rglob("*")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0][:80] or "nothing")
def test_a_bad_input_ends_with_a_sentence(case, material, monkeypatch, capsys):
    line, words, code = (*case, 2)[:3]
    monkeypatch.chdir(material)
    before = files(material)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(line))
    captured = capsys.readouterr()
    said = " ".join(captured.err.split())
    assert stopped.value.code == code, said
    assert said.count("error: ") == 1 and words in said.split("error: ")[1], said
    assert not captured.out and "Traceback" not in said and len(said.split("error: ")[1]) < 600, captured
    assert files(material) == before


def test_there_are_many_kinds():
    assert len(CASES) >= 120 and len({case[0] for case in CASES}) == len(CASES)
