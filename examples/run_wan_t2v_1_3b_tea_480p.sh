#!/usr/bin/env bash
# Usage: examples/run_wan_t2v_1_3b_tea_480p.sh BUNDLE PROMPT OUT.mp4
set -euo pipefail
freewheel run "$1" --prompt "$2" --out "$3" --config_json teacache/wan_t2v_1_3b_tea_480p
