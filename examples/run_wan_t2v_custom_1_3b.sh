#!/usr/bin/env bash
# Usage: examples/run_wan_t2v_custom_1_3b.sh BUNDLE PROMPT OUT.mp4
set -euo pipefail
freewheel run "$1" --prompt "$2" --out "$3" --config_json custom/wan_t2v_custom_1_3b
