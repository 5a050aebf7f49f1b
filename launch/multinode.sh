#!/usr/bin/env bash
# One node's share of a run on several nodes. Start it on every node, with the same arguments;
# torchrun's rendezvous brings them together:
#
#   NNODES=4 HEAD=node01 bash launch/multinode.sh \
#       recipe=hh_gipo with=hardware/h100x8_fp8 batch.minibatch=256
#
# NNODES          number of nodes
# HEAD            name or address of one of them, reachable from all; the rendezvous is there
# PORT            29500            of the rendezvous, free on HEAD
# RUN_ID          gipo             nodes with the same id meet: give concurrent runs on one HEAD
#                                  different ids and ports
# NPROC_PER_NODE  gpu              processes on this node: gpu is one a GPU
# MAX_RESTARTS    3                how often torchrun starts all workers again after one has died
# SHUTDOWN        1800             seconds that a worker has to finish its step and write a
#                                  checkpoint after a signal
# PYTHON          python           of the environment that this project is installed in
#
# When a worker dies, torchrun starts the workers of all nodes anew, and `run.resume: auto`, the
# default, continues at the newest checkpoint (at most run.save_every steps are lost). A node that
# fails has to start this script again. run.dir must be on a file system that all nodes share. The
# recipe is checked first, on each node: a restart would not correct a mistake in it.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${NNODES:?set NNODES to the number of nodes}"
: "${HEAD:?set HEAD to the name of the node that hosts the rendezvous}"
PYTHON="${PYTHON:-python}"
NPROC_PER_NODE="${NPROC_PER_NODE:-gpu}"

# Sequence parallelism relies on kernels being launched in order: Megatron-Core requires one
# hardware queue on Hopper and before.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# NCCL's warnings and errors only; use INFO when a job does not start.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# A collective that fails or times out ends the process: torch's default, set here because restarts
# depend on it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# Each start gets a store of its own. By default workers share the rendezvous' store, and after a
# restart they find the addresses of dead workers there and try to connect to them (pytorch issues
# 135712 and 167288).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Where the wrong network card is taken: export NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (the name
# of the right one) before this script.

processes="$NPROC_PER_NODE"
if [ "$processes" = gpu ]; then
    processes="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
    if [ "$processes" = 0 ]; then
        echo "$(hostname): torch sees no GPU; \"$PYTHON tools/doctor.py\" shows why;" \
            "NPROC_PER_NODE=2 starts two processes on the CPU" >&2
        exit 2
    fi
fi

recipe=""
settings=()
for word in "$@"; do
    case "$word" in
        recipe=*) recipe="${word#recipe=}" ;;
        *) settings+=("$word") ;;
    esac
done
"$PYTHON" tools/recipe.py check "$recipe" "${settings[@]}" "world=$((NNODES * processes))"

# exec: a signal to this script is a signal to torchrun, which hands it on to its workers. They
# finish the step, write a checkpoint and exit 0.
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" \
    --nproc-per-node "$processes" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:${PORT:-29500}" \
    --rdzv-id "${RUN_ID:-gipo}" \
    --max-restarts "${MAX_RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --shutdown-timeout "${SHUTDOWN:-1800}" \
    launch/train.py "$@"
