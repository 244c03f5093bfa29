#!/bin/bash
# Prepares public corpora in English, German, Spanish and French for conf/emmett_data/public_translation.yaml and
# conf/evaluate_fleurs_flores.yaml:
#
#   bash prepare_public_corpora.sh SOURCES OUT [--jobs N]
#
# SOURCES holds the downloaded corpora, unpacked, each in a folder of the name below; docs/corpora.md says what to
# download. A corpus without a folder is left out. One that is finished is kept, so run it again after an interruption.
#
#   flores  fleurs                                      to validate and test on; kept out of all that is trained on
#   covost2 (and common_voice)  europarl_st  must_c  mtedx                                   speech to train on
#   opus  tatoeba  multi30k                                                                  text to train on
#
# OUT receives a folder for each, and the lists that the recipe reads: input_cfg/train_speech.yaml and train_text.yaml.

set -euo pipefail
shopt -s nullglob

TEST=(flores fleurs)
SPEECH=(covost2 europarl_st must_c mtedx)
TEXT=(opus tatoeba multi30k)
LANGUAGES=en,de,es,fr

if (($# < 2)); then
    echo "Usage: $0 SOURCES OUT [--jobs N]" >&2
    exit 2
fi
SOURCES=$1
OUT=$2
OPTIONS=("${@:3}")

is_there() { [[ -d $SOURCES/$1 ]]; }

# prepare NAME [option ...]: the corpus of that name, if it is there.
prepare() {
    if is_there "$1"; then
        echo "== $1"
        nemo-emmett prepare "${1//_/-}" "$SOURCES/$1" "$OUT/$1" "${@:2}" "${OPTIONS[@]}"
    fi
}

# Those of our languages that occur in the names of a folder's files, for corpora downloaded in part.
languages_in() {
    ls "$SOURCES/$1" 2>/dev/null | tr -c 'a-z\n' '\n' | grep -xE "${LANGUAGES//,/|}" | sort -u | paste -sd,
}

# collect LIST FILE ...: the sources of these files in one list.
collect() {
    if (($# == 1)); then
        echo "No training data for $1."
    else
        mkdir -p "$OUT/input_cfg"
        cat "${@:2}" >"$OUT/input_cfg/$1"
    fi
}

num_there=0
for name in "${TEST[@]}" "${SPEECH[@]}" "${TEXT[@]}"; do
    if is_there "$name"; then
        num_there=$((num_there + 1))
    else
        echo "$name is not in $SOURCES and is left out."
    fi
done
if ((num_there == 0)); then
    echo "There is no corpus in $SOURCES: put one into a folder of one of these names." >&2
    exit 1
fi

# Not FLEURS' training split: its sentences are those of FLORES, devtest among them.
prepare flores --languages $LANGUAGES
fleurs=(--languages $LANGUAGES --splits dev,test --audio flac)
if is_there flores; then fleurs+=(--flores "$SOURCES/flores"); fi
prepare fleurs "${fleurs[@]}"

held_out=()
for name in "${TEST[@]}"; do
    if is_there "$name"; then held_out+=(--held-out "$OUT/$name"); fi
done

speech=(--splits train --audio tar --max-length-ratio 3 "${held_out[@]}")
prepare covost2 --common-voice "$SOURCES/common_voice" --languages "$(languages_in covost2)" "${speech[@]}"
prepare europarl_st --languages $LANGUAGES "${speech[@]}"
prepare must_c --languages "$(languages_in must_c)" "${speech[@]}"
prepare mtedx --languages "$(languages_in mtedx)" "${speech[@]}"

text=(--splits train --max-length-ratio 3 --language-id --deduplicate "${held_out[@]}")
prepare opus --languages $LANGUAGES "${text[@]}"
prepare tatoeba --languages $LANGUAGES "${text[@]}"
prepare multi30k --languages en,de,fr "${text[@]}"

# By spoken language, or (MuST-C) by pair; train.es-es of mTEDx is to transcribe, not to translate.
collect train_speech.yaml "$OUT"/{covost2,europarl_st,mtedx}/input_cfg/train.??.yaml \
    "$OUT"/must_c/input_cfg/train.*.yaml
collect train_text.yaml "$OUT"/{opus,tatoeba,multi30k}/input_cfg/train*.yaml

# The test sentences have been left out; this reads everything once more to confirm it, or exits with 1.
training=()
for name in "${SPEECH[@]}" "${TEXT[@]}"; do
    if is_there "$name"; then training+=("$OUT/$name"); fi
done
if ((${#training[@]} > 0 && ${#held_out[@]} > 0)); then
    nemo-emmett prepare leaks --no-near "${held_out[@]}" "${training[@]}"
fi
