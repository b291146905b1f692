# shellcheck shell=bash disable=SC2034
# Settings of your cluster, for all scripts in this folder. A variable of the environment counts more than its line here.
: "${MODULES:=}"           # environment modules loaded on every node, e.g. "python/3.12 cuda/13.0"
: "${HYLO_PYTHON:=}"       # interpreter, e.g. /shared/venv/bin/python; empty: the repository's .venv, else python
: "${CONTAINER_IMAGE:=}"   # container: a .sif for apptainer, else for pyxis/enroot (.sqsh, registry#name:tag)
: "${CONTAINER_MOUNTS:=}"  # HOST:CONTAINER,... besides HYLO_ROOT, OUTPUT and the repository, which keep their paths
: "${NETWORK_INTERFACE:=}" # of the ranks' sockets, e.g. ib0 or eth0; empty: NCCL's choice
: "${NODE_CHECK:=}"        # 1: half a minute of `hylo doctor --node` on all ranks before a run starts
# Of submit_chain.sh; sbatch reads the SBATCH_* variables of the environment by itself, and #SBATCH lines of the stage scripts.
: "${SBATCH_ACCOUNT:=}"   # account that is charged
: "${SBATCH_PARTITION:=}" # partition
: "${SBATCH_QOS:=}"       # quality of service
: "${SINGLETON:=}"        # 1: a stage waits for earlier jobs of its name and user, so that two never train at a time
