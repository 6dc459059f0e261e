"""Models by name: folders checked, the built-in converted once, clear errors."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from reasoner_ray import models
from reasoner_ray.errors import ModelError
from reasoner_ray.models import (
    builtin_folder,
    check_model_folder,
    check_tokenizer_matches,
    cpu_flags,
    load_tokenizer,
    read_config,
    resolve_dtype,
    resolve_model,
)


@pytest.fixture
def copied(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_local_folder_resolves_to_itself(tiny_model_dir: Path) -> None:
    assert resolve_model(str(tiny_model_dir)) == tiny_model_dir.resolve()


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "no config.json"), ("model.safetensors", "weights missing"), ("tokenizer.json", "no tokenizer")],
)
def test_incomplete_folder_is_named(copied: Path, file: str, message: str) -> None:
    (copied / file).unlink()
    with pytest.raises(ModelError, match=message):
        resolve_model(str(copied))


def test_truncated_shards_and_other_formats_are_named(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: convert to safetensors"):
        check_model_folder(copied)
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    )
    (copied / "model-1.safetensors").write_bytes(b"x")
    (copied / "model-2.safetensors").touch()
    with pytest.raises(ModelError, match=r"empty: model-2\.safetensors"):
        check_model_folder(copied)


def test_broken_config_is_named(copied: Path) -> None:
    (copied / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        resolve_model(str(copied))


def test_adapter_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="LoRA adapter"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "runs/quickstart/model"])
def test_missing_folder_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # a run may have left its model in the checkout
    with pytest.raises(ModelError, match="no such folder"):
        resolve_model(name)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set.*builtin:smollm2-135m"):
        resolve_model("someone/some-model-that-is-not-cached")
    with pytest.raises(ModelError, match=r"did you mean builtin:smollm2-135m\?"):
        resolve_model("smollm2-135m")


def test_unknown_builtin_and_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="there is builtin:smollm2-135m"):
        resolve_model("builtin:gpt-9")
    monkeypatch.setitem(models.BUILTINS, "absent", models.Builtin("no_such_module_here", "pip install absent", "1"))
    with pytest.raises(ModelError, match="run `pip install absent`"):
        resolve_model("builtin:absent")


def test_processes_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes ask for the same model; one converts, a killed conversion's leftovers are replaced."""
    program = """
import sys, time
from pathlib import Path
from reasoner_ray import models
def convert(source, folder):
    folder.mkdir()
    time.sleep(0.3)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / file).write_text("{}")
    print("converted")
models._convert_gguf = convert
models.builtin_file = lambda name: Path("a.gguf")
print(models.resolve_model("builtin:smollm2-135m"))
"""
    monkeypatch.setenv("REASONER_RAY_CACHE", str(tmp_path))
    folder = builtin_folder("smollm2-135m")
    leftover = folder.with_name(f".{folder.name}.partial")
    leftover.mkdir(parents=True)
    runs = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    output = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert "".join(output).count("converted") == 1
    assert all(str(folder) in text for text in output)
    assert not leftover.exists()


@pytest.mark.slow
def test_builtin_model_is_a_complete_tied_bf16_folder(smollm_dir: Path) -> None:
    from safetensors import safe_open

    config = read_config(smollm_dir)
    assert (config["vocab_size"], config["num_hidden_layers"], config["tie_word_embeddings"]) == (49152, 30, True)
    with safe_open(smollm_dir / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118  (not a dict)
        assert weights.get_tensor("model.norm.weight").dtype == torch.bfloat16
    tokenizer = load_tokenizer(smollm_dir)
    check_tokenizer_matches(smollm_dir, tokenizer)
    assert tokenizer.decode(tokenizer.encode("12 + 7 = 19")) == "12 + 7 = 19"


def test_tokenizer_checks(copied: Path) -> None:
    tokenizer = load_tokenizer(copied)
    check_tokenizer_matches(copied, tokenizer)
    edit_config(copied, vocab_size=100)
    with pytest.raises(ModelError, match=r"the model only 100: it belongs to another model"):
        check_tokenizer_matches(copied, tokenizer)
    edit_config(copied, vocab_size=50_000, eos_token_id=[1, 40_000])
    with pytest.raises(ModelError, match="ends its texts with token 40000"):
        check_tokenizer_matches(copied, tokenizer)
    edit_config(copied, eos_token_id=1)
    with pytest.raises(ModelError, match="has 512 entries, the model 50000 rows, more than padding explains"):
        check_tokenizer_matches(copied, tokenizer)
    edit_config(copied, vocab_size=512 + models.SPARE_ROWS)  # padded
    check_tokenizer_matches(copied, tokenizer)
    edit_config(copied, vocab_size=512)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        check_tokenizer_matches(copied, tokenizer)


def test_a_tokenizer_must_end_texts_as_its_model_does(copied: Path) -> None:
    tokenizer = load_tokenizer(copied)
    edit_config(copied, eos_token_id=7)
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    with pytest.raises(ModelError, match=r"ends texts with '<\|eos\|>' \(token 1\), the model with token 7 or 9 "):
        check_tokenizer_matches(copied, tokenizer)
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 1]}))  # as of a chat model
    check_tokenizer_matches(copied, tokenizer)
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": 600}))
    with pytest.raises(ModelError, match="ends its texts with token 600"):
        check_tokenizer_matches(copied, tokenizer)
    (copied / "generation_config.json").unlink()
    edit_config(copied, eos_token_id=None, text_config={"vocab_size": 512, "eos_token_id": 1})
    check_tokenizer_matches(copied, tokenizer)


@pytest.mark.parametrize(("tokens", "rows"), [(151_665, 151_936), (50_295, 51_200), (100_015, 102_400), (128_256, 128_256)])
def test_padding_and_reserves_of_known_models_are_allowed(copied: Path, tokens: int, rows: int) -> None:
    class Sized(SimpleNamespace):
        def __len__(self) -> int:
            return tokens

    edit_config(copied, vocab_size=rows)
    check_tokenizer_matches(copied, Sized(eos_token_id=1, eos_token="e"))
    edit_config(copied, vocab_size=tokens + 24_000)  # Llama 3's tokenizer beside Qwen2.5's rows is 23,680 apart
    with pytest.raises(ModelError, match="more than padding explains"):
        check_tokenizer_matches(copied, Sized(eos_token_id=1, eos_token="e"))


def test_broken_tokenizer_is_a_model_error(copied: Path) -> None:
    (copied / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(copied)


def test_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_dtype("float32") == torch.float32
    monkeypatch.setattr(models, "has_native_bfloat16", lambda: True)
    assert resolve_dtype("auto") == resolve_dtype("bfloat16") == torch.bfloat16
    assert not caplog.records
    monkeypatch.setattr(models, "has_native_bfloat16", lambda: False)
    assert resolve_dtype("auto") == torch.float32
    with caplog.at_level(logging.WARNING):
        assert resolve_dtype("bfloat16") == torch.bfloat16
    assert "emulated" in caplog.text


def test_cpu_flags_of_x86_and_arm(tmp_path: Path) -> None:
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert cpu_flags(x86) >= {"avx512_bf16", "amx_bf16"}
    assert "bf16" in cpu_flags(arm)
    assert cpu_flags(tmp_path / "absent") == set()


def test_an_old_repositorys_weights_are_converted_once(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Math-Shepherd's model has pickled shards alone on the hub."""
    snapshot, asked = tmp_path / "snapshots" / "abc", []
    weights = load_file(tiny_model_dir / "model.safetensors")
    names = sorted(weights)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}

    def fetch(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append(allow_patterns)
        if allow_patterns == models.HUB_FILES:
            shutil.copytree(tiny_model_dir, snapshot, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
            index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
            (snapshot / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        else:
            for shard, keys in shards.items():
                torch.save({key: weights[key] for key in keys}, snapshot / shard)
        if name == "someone/broken-prm":
            (snapshot / "pytorch_model-00001-of-00002.bin").write_bytes(b"broken")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr(models.settings, "cache_dir", lambda: tmp_path / "cache")
    folder = resolve_model("someone/old-prm")
    assert asked == [models.HUB_FILES, models.OLD_WEIGHTS]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in names)
    assert resolve_model("someone/old-prm") == folder
    with pytest.raises(ModelError, match=r"pytorch_model-00001-of-00002\.bin cannot be read as weights"):
        resolve_model("someone/broken-prm")
