#!/bin/bash
# Starts Slurm on this machine, runs GRPO with two tasks, and ends Slurm again.
#
#   apt-get install slurm-wlm
#   benchmarks/slurm.sh [PYTHON] [FLAGS of experiments.grpo]
#
# Each task is a process of one run, and they find each other by what Slurm tells them. It needs root,
# touches no configuration of the machine, and leaves its files in a folder of /tmp, which it names.
set -euo pipefail

python=${1:-python}
shift || true
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d -t klrl_slurm.XXXXXX)
host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf
mkdir "$folder"/{state,spool,munge}
echo "Files: $folder"

cat > "$SLURM_CONF" << END
ClusterName=klrl
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
SlurmUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
END
echo "CgroupAutomount=no" > "$folder/cgroup.conf"

processes=()
end() {
  for ((i = ${#processes[@]} - 1; i >= 0; i--)); do kill "${processes[i]}" 2> /dev/null || true; done
  wait 2> /dev/null || true
}
trap end EXIT

dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chmod 400 "$folder/munge/key"
munged --foreground --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
  --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" --log-file="$folder/munge/log" &
processes+=($!)
sleep 1
slurmctld -D -f "$SLURM_CONF" > "$folder/slurmctld.out" 2>&1 &
processes+=($!)
slurmd -D -f "$SLURM_CONF" > "$folder/slurmd.out" 2>&1 &
processes+=($!)
for _ in $(seq 30); do
  sinfo --noheader --format=%T 2> /dev/null | grep -q idle && break
  sleep 1
done
sinfo

# The embedded stages are hardly trained, and their files stay in the folder too.
srun --ntasks=2 --chdir="$folder" --export=ALL,PYTHONPATH="$root",JAX_PLATFORMS=cpu \
  "$python" -m experiments.grpo --workdir="$folder/run" --num_iterations=3 --batch_size=32 \
  --sft_iterations=5 --reward_model_iterations=5 --num_eval_rows=32 --eval_every=0 "$@"
echo "Iterations recorded: $(wc -l < "$folder/run/metrics.jsonl")"
