#!/bin/bash
#SBATCH --job-name=emmett
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append

# The paper's set-up on public corpora: trains a recipe on what prepare_public_corpora.sh has written, and evaluates the
# model on FLORES and FLEURS, on all GPUs of the job. From the folder of train.py:
#
#   sbatch --nodes=8 slurm_emmett.sh salm_t5 /data [key=value ...]
#
# The first argument names the recipe (salm_t5, salm_gpt, bestow_gpt), the second the folder of the prepared corpora; the
# others are for the training. Results are in exp/RECIPE, or EXP_DIR: checkpoints, model, and evaluation with the report.
#
# slurm_train.sh does the training, and queues the job again where that is needed. A training that is longer than the
# time limit goes on in jobs queued behind one another, as described there; one that finds the evaluation has nothing
# left to do.

if (($# < 2)); then
    echo "Usage: sbatch --nodes=N slurm_emmett.sh RECIPE CORPUS [key=value ...]" >&2
    exit 2
fi
RECIPE=$1
CORPUS=$2
EXP_DIR=${EXP_DIR:-exp/$RECIPE}

if [[ -f $EXP_DIR/evaluation/evaluation.json ]]; then
    echo "$EXP_DIR/evaluation exists already; delete it to evaluate again."
    exit 0
fi

bash "$SLURM_SUBMIT_DIR/slurm_train.sh" --config-name="$RECIPE" emmett_data=public_translation corpus="$CORPUS" \
    exp_dir="$EXP_DIR" "${@:3}" || exit

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false

# All have to be there to exchange translations: where one fails, the others need not wait.
srun --kill-on-bad-exit=1 python "$SLURM_SUBMIT_DIR/evaluate.py" --config-name=evaluate_fleurs_flores corpus="$CORPUS" \
    model="$EXP_DIR/model" output="$EXP_DIR/evaluation" log_dir="$EXP_DIR"
