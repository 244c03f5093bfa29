#!/bin/bash
#SBATCH --job-name=emmett
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

# Trains the recipe that its arguments name on all nodes of the job, one task per GPU. From the folder of train.py:
#
#   sbatch --nodes=8 slurm_train.sh --config-name=salm_t5 corpus=/data
#
# The job is queued again where the training asks for it by exit code 75: it ran out of memory in a step that could not
# be redone, has lowered the batch size in its profile, and goes on from its last checkpoint
# (exp_manager.resume_if_exists). A training that is longer than the time limit goes on from there too, in jobs queued
# behind one another, one of a name at a time:
#
#   for _ in 1 2 3; do sbatch --nodes=8 --dependency=singleton slurm_train.sh --config-name=salm_t5 corpus=/data; done
#
# On a single machine without SLURM, torchrun starts the training again by itself:
#
#   torchrun --nproc-per-node=8 --max-restarts=3 train.py --config-name=salm_t5 corpus=/data trainer.devices=8

TRY_AGAIN=75
MOST_RESTARTS=10

# Each task has its share of the node's cores for itself and its data workers; more threads would be in their way.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
# What is allocated grows and shrinks with the buckets; segments that can do so too leave fewer gaps.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# Ranks leave by themselves; give them a minute before srun ends those that are left.
srun --kill-on-bad-exit=0 --wait=60 python "$SLURM_SUBMIT_DIR/train.py" "$@" \
    trainer.num_nodes="$SLURM_JOB_NUM_NODES" trainer.devices="$SLURM_NTASKS_PER_NODE"
code=$?

if ((code == TRY_AGAIN && ${SLURM_RESTART_COUNT:-0} < MOST_RESTARTS)); then
    echo "Out of memory: queued again (restart $((${SLURM_RESTART_COUNT:-0} + 1)) of $MOST_RESTARTS)."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
