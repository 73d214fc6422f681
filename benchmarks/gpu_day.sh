#!/usr/bin/env bash
# Measure on a GPU what can be measured in 8.5 minutes, the most telling first: benchmarks/gpu_day.sh FOLDER
# Needs python3 with torch for CUDA, transformers, triton, and pytest for the tests; neither pip nor a network.
# Every part has its own limit and log in FOLDER, and nothing stops what follows. gpu_day.json has all numbers at the end.
# TOTAL: seconds for all of it (500). PYTHON: another python. TINY=1: shapes for a rehearsal, whose numbers mean nothing. PATIENCE: limits times so much.
set -uo pipefail
out=$(mkdir -p "${1:?a folder for the results}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
read -ra python <<< "${PYTHON:-python3}"
tiny=${TINY:+--tiny}
export PYTHONPATH="$PWD:$PWD/tests/helpers${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
: > "$out/parts.tsv"
total=$((${TOTAL:-500} * ${PATIENCE:-1}))

part() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * ${PATIENCE:-1})) began=$SECONDS code=0
  shift 2
  [ $limit -lt $((total - SECONDS)) ] || limit=$((total - SECONDS))
  [ $limit -gt 0 ] || { printf '%s\t125\t0\t0\n' "$name" | tee -a "$out/parts.tsv"; return; }  # no time is left
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1 < /dev/null || code=$?
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" $((SECONDS - began)) "$limit" | tee -a "$out/parts.tsv"
}
measure() { part "$1" "$2" "${python[@]}" benchmarks/gpu_parts.py "${@:3}" $tiny; }
tests() { part "$1" "$2" "${python[@]}" -m pytest -n0 -p no:cacheprovider -rA --tb=short -o timeout=60 -m gpu "${@:3}"; }
train() {  # NAME SECONDS settings...
  part "$1" "$2" "${python[@]}" train.py --config configs/quick.yaml "trainer.output_dir=$out/$1" trainer.run_name=run \
    reward.path=benchmarks/step_reward.py reward.check_rows=0 objective.margin=0 eval.before_and_after=false \
    eval.round_prompts=0 trainer.save_freq=0 "${@:3}"
}
small=() step=(data.train_batch_size=64 rollout.n=8 rollout.max_new_tokens=256) work=()
if [ -n "$tiny" ]; then
  small=(data.train_batch_size=2 rollout.n=2 rollout.max_new_tokens=6)
  step=("${small[@]}") work=(--model gspo/embedded/model --prompt 8 --response 8 --n 2 --groups 1 --repeats 1 --square 64)
fi

command -v nvidia-smi > /dev/null && part nvidia-smi 10 nvidia-smi
measure rates 30 rates
train smoke 40 trainer.max_steps=3 "${small[@]}"
mv "$out/smoke.log" "$out/smoke-first.log"
train smoke 30 trainer.max_steps=4 "${small[@]}"  # the same run goes on
measure model 30 model "$out/model"
if [ -z "$tiny" ]; then
  tests tests-layers 40 tests/gpu/test_layers_on_cuda.py
  tests tests-engine 60 tests/gpu/test_engine_on_cuda.py -k "tokens_of_the_cpu or graphs or host_does or work_that"
  tests tests-attention 45 tests/gpu/test_attention_on_cuda.py -k "trial or proven or whole_models"
  tests tests-logprob 40 tests/gpu/test_logprob_on_cuda.py
  tests tests-pairwise 20 tests/gpu/test_pairwise_on_cuda.py
  tests tests-training 60 tests/gpu/test_training_on_cuda.py
else
  tests tests-pairwise 20 tests/gpu/test_pairwise_on_cuda.py -k takes_its_coefficients
fi
measure decode 60 decode
part packed-step 45 "${python[@]}" benchmarks/packed_step.py --device cuda "${work[@]}"
for where in resident offloaded; do
  offload=$([ $where = offloaded ] && echo true || echo false)
  train "step-$where" 60 "model.path=$out/model" 'data.train_files=[embedded]' trainer.max_steps=2 \
    "reference.param_offload=$offload" "${step[@]}"
done
if [ -z "$tiny" ]; then
  part kernels 40 "${python[@]}" benchmarks/operations.py --device cuda --among "plain logits and log-softmax" linear_logprob
  command -v compute-sanitizer > /dev/null && part sanitizer 40 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "${python[@]}" -m pytest -n0 -m gpu tests/gpu/test_pairwise_on_cuda.py -k takes_its_coefficients
  part generate 60 "${python[@]}" benchmarks/rollout.py --device cuda --prompt_tokens 256 --new_tokens 128 --repeats 1
fi
"${python[@]}" benchmarks/gpu_parts.py report "$out"
