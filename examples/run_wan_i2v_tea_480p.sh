#!/usr/bin/env bash
# Usage: examples/run_wan_i2v_tea_480p.sh BUNDLE PROMPT OUT.mp4 IMAGE
set -euo pipefail
IMAGE=$4
freewheel run "$1" --prompt "$2" --out "$3" --config_json teacache/wan_i2v_tea_480p --image "$IMAGE"
