#!/usr/bin/env bash
# Usage: examples/run_wan_t2v_ada.sh BUNDLE PROMPT OUT.mp4
set -euo pipefail
freewheel run "$1" --prompt "$2" --out "$3" --config_json adacache/wan_t2v_ada
