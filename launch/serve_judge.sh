#!/usr/bin/env bash
# Starts vLLM as the judge's server on a GPU host:   launch/serve_judge.sh [--dry-run] [flags of `vllm serve` ...]
# It serves `world-distill annotate` as well (annotator.options in place of judge.options).
#
#   MODEL     the judge (Qwen/Qwen3.5-27B); a config names it in judge.options.model
#   GPUS      devices that one copy of the model is spread over (1)
#   PORT      (8000); a config names http://HOST:PORT/v1 in judge.options.servers
#   FRAMES    of a clip, judge.options.frames (16)
#   LENGTH    tokens of a request: the frames, the question and a margin (16384)
#
# One server a host or device scales best: name all of them in judge.options.servers.
#
# Other servers: world_distill/judges/README.md says which of them can judge. A hosted model can if it takes pictures
# and gives logprobs of the first token; most that think before they answer give none. Then
#   --config.judge.options.servers=https://HOST/v1 --config.judge.options.model=NAME
#   --config.judge.options.api_key_env=NAME_OF_THE_VARIABLE_WITH_THE_KEY
# The judge tests each server before it asks it about clips, and says what is missing.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi

command=(
  vllm serve "${MODEL:-Qwen/Qwen3.5-27B}"
  --port "${PORT:-8000}"
  --tensor-parallel-size "${GPUS:-1}"
  --max-model-len "${LENGTH:-16384}"
  --limit-mm-per-prompt "{\"image\": ${FRAMES:-16}}"
  --max-logprobs 20             # as many as are asked for
  --logprobs-mode raw_logprobs  # the model's own, so that the mass of yes and no means something
  --enable-prefix-caching       # questions of a clip share its frames
  "$@"
)

if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
