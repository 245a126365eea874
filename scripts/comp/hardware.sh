# shellcheck shell=bash disable=SC2034 # its results are read by common.sh
# From the machine to a launcher: torchrun over all GPUs of all nodes, or one CPU process. Sourced by common.sh.

# Sets NUM_GPUS (of this node), NNODES, NODE_RANK, WORLD (processes), PYTHON, LAUNCHER and HARDWARE_FLAGS.
detect_hardware() {
  find_python
  NUM_GPUS=${NUM_GPUS:-$(count_gpus)}
  require_number NUM_GPUS 0 # 0 is the CPU
  if ((NUM_GPUS == 0)); then
    NNODES=1 NODE_RANK=0 WORLD=1
    LAUNCHER=("$PYTHON" -m llava.train.train_mem)
    HARDWARE_FLAGS=(--use_cpu True)
    return
  fi
  detect_nodes
  WORLD=$((NUM_GPUS * NNODES))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
  # After a SIGTERM torchrun waits so many seconds for a step and a checkpoint; its own 30 would cut the save.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
  LAUNCHER=(
    torchrun
    --nproc_per_node="$NUM_GPUS"
    --nnodes="$NNODES"
    --node_rank="$NODE_RANK"
    --master_addr="$MASTER_ADDR"
    --master_port="$MASTER_PORT"
    -m llava.train.train_mem
  )
  HARDWARE_FLAGS=(--deepspeed scripts/zero3.json --bf16 True --tf32 True)
}

# NAME LEAST [MOST]: the variable holds a whole number, written as arithmetic reads it (08 would be octal).
require_number() {
  local name=$1 least=$2 most=${3:-}
  local value=${!name} range="$least or more"
  [[ -z $most ]] || range="$least to $most"
  if [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] && ((value >= least && value <= ${most:-value})); then return 0; fi
  die "$name=$value: expected a whole number, $range"
}

count_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    case $CUDA_VISIBLE_DEVICES in
      "" | -1) printf 0 ;;
      *) printf '%s' "$CUDA_VISIBLE_DEVICES" | awk -F, '{ for (i = 1; i <= NF; i++) n += ($i != "") } END { printf "%d", n }' ;;
    esac
  elif has_nvidia_gpu; then
    nvidia-smi -L | grep -c '^GPU'
  else
    printf 0
  fi
}

# One task per node: `srun --ntasks-per-node=1 bash scripts/comp/...`, or the four variables set by hand on each node.
detect_nodes() {
  NNODES=${NNODES:-${SLURM_NNODES:-1}}
  NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
  MASTER_PORT=${MASTER_PORT:-29500}
  require_number NNODES 1
  require_number NODE_RANK 0 $((NNODES - 1))
  require_number MASTER_PORT 1 65535
  if [[ -z ${MASTER_ADDR:-} ]]; then
    if ((NNODES == 1)); then
      MASTER_ADDR=127.0.0.1
    elif [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
      local hosts # Whole, then cut: `| head -n 1` may end scontrol by SIGPIPE, which pipefail takes for a failure.
      hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
      MASTER_ADDR=${hosts%%$'\n'*}
    else
      die "NNODES=$NNODES but MASTER_ADDR is not set: give the first node's address on every node"
    fi
  fi
}

main_node() { ((NODE_RANK == 0)); }

# Another node makes FILE on the shared file system. If that one fails, GPUs here must not wait for it for ever: an hour is
# several times what the longest such work takes, to count the words of the paper's Stage-II data.
wait_for() {
  local minutes=${NODE_WAIT_MINUTES:-60} begin=$SECONDS
  [[ -e $1 ]] || say "node $NODE_RANK: waiting for node 0 to make $1"
  until [[ -e $1 ]]; do
    ((SECONDS - begin < 60 * minutes)) ||
      die "node $NODE_RANK: node 0 has not made $1 in $minutes minutes (NODE_WAIT_MINUTES). Look at what it says; if it is well, start this node again."
    sleep 5
  done
}

# The recipe's global batch, whatever the number of processes: sets BATCH_PER_DEVICE and ACCUMULATION.
split_batch() {
  local share=$((GLOBAL_BATCH / WORLD))
  PER_DEVICE_BATCH=${PER_DEVICE_BATCH:-$BATCH_PER_DEVICE}
  require_number PER_DEVICE_BATCH 1
  BATCH_PER_DEVICE=$PER_DEVICE_BATCH
  ((share * WORLD == GLOBAL_BATCH)) ||
    die "$1: its global batch of $GLOBAL_BATCH cannot be shared evenly by $WORLD processes; set NUM_GPUS or NNODES to a divisor"
  ((BATCH_PER_DEVICE < share)) || BATCH_PER_DEVICE=$share
  ACCUMULATION=$((share / BATCH_PER_DEVICE))
  ((ACCUMULATION * BATCH_PER_DEVICE == share)) ||
    die "$1: $share samples a process and step cannot be split into micro-batches of $BATCH_PER_DEVICE; set PER_DEVICE_BATCH to a divisor of $share"
}

describe_hardware() {
  if ((NUM_GPUS == 0)); then
    printf 'one CPU process'
  else
    printf '%d GPUs: %d x %d samples each, %d a step' "$WORLD" "$BATCH_PER_DEVICE" "$ACCUMULATION" "$GLOBAL_BATCH"
  fi
}
