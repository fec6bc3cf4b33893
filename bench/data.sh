#!/usr/bin/env bash
# Gets the data and the small model that bench/results name, each file as it was when they were measured:  bash bench/data.sh FOLDER
#
#   gsm8k_train_2k.jsonl, gsm8k_test_500.jsonl   the first 2000 and 500 problems of GSM8K without the calculator's notes (MIT, OpenAI)
#   gsm8k.txt                                    the same 2000 as text: question, answer, empty line
#   webglm_nq_open.jsonl                         400 of Natural Questions' open questions (Apache-2.0, WebGLM)
#   tinyshakespeare.txt                          1.1 MB of Shakespeare (public domain, char-rnn)
#   stories260K.bin, tok512.bin                  a Llama of 260 K parameters and its tokenizer (MIT, llama2.c)
#
# A file that is there with the right SHA-256 stays; another appears whole and verified, or not at all. SmolLM2-135M-Instruct.Q4_1.gguf comes
# with examples/run.sh. Needs curl and Python.
set -euo pipefail
folder=${1:?"name the folder that the files go to: bash bench/data.sh FOLDER"}
mkdir -p "$folder"
work=$(mktemp -d "$folder/getting.XXXXXX")
trap 'rm -rf "$work"' EXIT

# get FILE SHA256 REPOSITORY COMMIT PATH [FILTER...]   of a repository on GitHub; FILTER is a command from its file to ours
get() {
  local file=$1 sha256=$2 repository=$3 commit=$4 path=$5
  shift 5
  if [[ -f $folder/$file ]] && echo "$sha256  $folder/$file" | sha256sum --check --status; then return; fi
  echo "$file: from $repository, $path"
  curl --fail --silent --show-error --location --retry 3 --output "$work/original" \
    "https://raw.githubusercontent.com/$repository/$commit/$path"
  "${@:-cat}" < "$work/original" > "$work/$file"
  echo "$sha256  $work/$file" | sha256sum --check --status ||
    { echo "$file: what came does not have the SHA-256 $sha256" >&2; exit 1; }
  mv -f "$work/$file" "$folder/$file"
}

# problems COUNT   the first COUNT lines of GSM8K, without the <<...>> that a calculator is told
problems() {
  python3 -c '
import json, re, sys
for line, _ in zip(sys.stdin, range(int(sys.argv[1]))):
    problem = json.loads(line)
    problem["answer"] = re.sub("<<[^>]*>>", "", problem["answer"])
    print(json.dumps(problem, ensure_ascii=False))' "$1"
}

gsm8k=(openai/grade-school-math 3101c7d5072418e28b9008a6636bde82a006892c)
llama2=(ruhai-lin/llama2.v ba71d14269cfa3d09257cbaeaf79b4134c56d672)
get gsm8k_train_2k.jsonl 1211d3ddc887339d2ce9c37ea178e9425c1a9ee110b006bd3a6139306414870d "${gsm8k[@]}" grade_school_math/data/train.jsonl problems 2000
get gsm8k_test_500.jsonl 8e7a9296a7710584b175ca1fb17d5e10c827b1a37aa21cc11d0224e48459d897 "${gsm8k[@]}" grade_school_math/data/test.jsonl problems 500
get webglm_nq_open.jsonl 58b20ed22a30a5f5f357f767cd536ea48ecc6886547ccbcf00d779e71d222a77 THUDM/WebGLM dd03d8fe05b504dc734f52e8689818deff643912 data/nq_open.jsonl
get tinyshakespeare.txt 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed karpathy/char-rnn 6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e data/tinyshakespeare/input.txt
get stories260K.bin b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696 "${llama2[@]}" model/stories260K.bin
get tok512.bin 037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312 "${llama2[@]}" model/tok512.bin

python3 - "$folder/gsm8k_train_2k.jsonl" "$work/gsm8k.txt" <<'PYTHON'
import json, sys
with open(sys.argv[1], encoding="utf-8") as lines, open(sys.argv[2], "w", encoding="utf-8") as text:
    for line in lines:
        problem = json.loads(line)
        text.write(f"{problem['question']}\n{problem['answer']}\n\n")
PYTHON
mv -f "$work/gsm8k.txt" "$folder/gsm8k.txt"
echo "Everything is in $folder"
