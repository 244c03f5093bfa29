#!/bin/bash
#SBATCH --job-name=emmett
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

# Trains, one task per GPU, and queues the job again where the training asks for it by exit code 75: it ran out of
# memory in a step that could not be redone, has lowered the batch size in its profile, and goes on from its last
# checkpoint (exp_manager.resume_if_exists). For example:
#
#   sbatch --nodes=2 slurm_requeue.sh --config-name=salm_t5_phrasebook trainer.num_nodes=2 trainer.devices=8
#
# On a single machine without SLURM, torchrun starts the training again by itself:
#
#   torchrun --nproc-per-node=8 --max-restarts=3 train.py --config-name=salm_t5_phrasebook trainer.devices=8

TRY_AGAIN=75
MOST_RESTARTS=10

# Ranks leave by themselves; give them a minute before srun ends those that are left.
srun --kill-on-bad-exit=0 --wait=60 python "$SLURM_SUBMIT_DIR/train.py" "$@"
code=$?

if ((code == TRY_AGAIN && ${SLURM_RESTART_COUNT:-0} < MOST_RESTARTS)); then
    echo "Out of memory: queued again (restart $((${SLURM_RESTART_COUNT:-0} + 1)) of $MOST_RESTARTS)."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
