#!/usr/bin/env bash
# Usage: examples/run_wan_i2v_ada.sh BUNDLE PROMPT OUT.mp4 IMAGE
set -euo pipefail
IMAGE=$4
freewheel run "$1" --prompt "$2" --out "$3" --config_json adacache/wan_i2v_ada --image "$IMAGE"
