#!/bin/bash
# Train VidTwin base on two nodes with eight GPUs each:
#   sbatch examples/slurm.sh data.root=/data/UCF-101 data.ucf101_split=1 output_dir=runs/vae
# Not run on a cluster; tests/test_examples.py runs it with stand-ins for the commands of SLURM and Accelerate.
#SBATCH --job-name=vidgen-vae
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120   # two minutes before the limit: the training writes a checkpoint and exits
#SBATCH --requeue           # the next start continues from it
set -euo pipefail

GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
NODES=${SLURM_NNODES:-1}
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=29500

# Continue from the newest checkpoint when the job was requeued.
RESUME=""
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then RESUME="resume=latest"; fi

srun bash -c "accelerate launch \
    --config_file configs/accelerate/ddp.yaml \
    --num_machines $NODES --num_processes $((NODES * GPUS_PER_NODE)) \
    --machine_rank \$SLURM_NODEID --main_process_ip $MASTER_ADDR --main_process_port $MASTER_PORT \
    train_vae.py --config configs/vae/paper.yaml $RESUME $*"
