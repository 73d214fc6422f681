#!/usr/bin/env bash
# The original launcher: environment variables, then flags, then section.key=value overrides, start the processes.
#   ./train.sh [--model M] [--rollout_n N] [--self_play_rounds R] [--reward_func FILE] [--n_gpus K] [--nnodes M]
#              [--config FILE] [--check] [--any_key VALUE] [section.key=value ...]
# ROLLOUT_N, SELF_PLAY_ROUNDS, PREFERENCE_BETA, MARGIN, USE_RANKING_LOSS, TRAIN_BATCH_SIZE, LEARNING_RATE, TOTAL_EPOCHS
# and ROLLOUT_TEMPERATURE are read from the environment; their defaults stand in configs/standard.yaml.
set -euo pipefail
root=$(cd "$(dirname "$0")" && pwd)  # paths that users type are relative to where they stand

fail() { echo "error: $1" >&2; exit 2; }

config=$root/configs/standard.yaml n_gpus=1 nnodes=1
settings=() overrides=() check=()
for name in ROLLOUT_N SELF_PLAY_ROUNDS PREFERENCE_BETA MARGIN USE_RANKING_LOSS TRAIN_BATCH_SIZE LEARNING_RATE \
            TOTAL_EPOCHS ROLLOUT_TEMPERATURE; do
  [ -z "${!name:-}" ] || settings+=("$(echo "$name" | tr "[:upper:]" "[:lower:]")=${!name}")
done
while [ $# -gt 0 ]; do
  case "$1" in
    -h|--help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --check) check=(--check); shift ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
    --*)
      [ $# -gt 1 ] || fail "$1 needs a value."
      case "$1" in
        --config) config=$2 ;;
        --n_gpus) n_gpus=$2 ;;
        --nnodes) nnodes=$2 ;;
        --model) settings+=("model.path=$2") ;;
        *) settings+=("${1#--}=$2") ;;
      esac
      shift 2 ;;
    *=*) overrides+=("$1"); shift ;;
    *) fail "$1 is neither a flag (--rollout_n 8) nor a setting (rollout.n=8)." ;;
  esac
done
[[ $n_gpus =~ ^[1-9][0-9]*$ ]] || fail "--n_gpus $n_gpus must be a number from 1 up."
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || fail "--nnodes $nnodes must be a number from 1 up."

python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" > /dev/null || make -C "$root" setup
args=(--config "$config" "${check[@]}" trainer.n_gpus="$n_gpus" trainer.nnodes="$nnodes" "${settings[@]}" "${overrides[@]}")
[ "$n_gpus:$nnodes" != 1:1 ] && [ ${#check[@]} = 0 ] || exec "$python" "$root/train.py" "${args[@]}"

launch=(--standalone)
[ "$nnodes" = 1 ] || launch=(--nnodes "$nnodes" --node_rank "${NODE_RANK:-0}" \
                             --master_addr "${MASTER_ADDR:?the first node}" --master_port "${MASTER_PORT:-29500}")
exec "$python" "$root/gspo/distributed/start_ranks.py" "${launch[@]}" --nproc_per_node "$n_gpus" "$root/train.py" "${args[@]}"
