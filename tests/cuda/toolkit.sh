#!/usr/bin/env bash
# Prints the environment to build with CUDA in: that of an installed toolkit, else of one assembled here from Python wheels
# (2 GB), which has all that the build needs and no driver.
#
#   eval "$(tests/cuda/toolkit.sh target/cuda-toolkit)" && cargo build --release --features cuda
#   tests/cuda/toolkit.sh --installed      fails unless nvcc and cuDNN are installed
set -euo pipefail

# Which GPU to build for: the build asks the driver, where there is one.
if ! nvidia-smi >/dev/null 2>&1; then echo "export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}"; fi

nvcc=$(command -v nvcc || true)
if [[ -n ${CUDA_HOME:-} && -x $CUDA_HOME/bin/nvcc ]]; then nvcc=$CUDA_HOME/bin/nvcc; fi
if [[ -n $nvcc ]]; then
  home=$(cd "$(dirname "$(readlink -f "$nvcc")")/.." && pwd)
  headers=("$home"/include/cudnn.h /usr/include/cudnn.h /usr/include/*-linux-gnu/cudnn.h)
  for header in "${headers[@]}"; do
    if [[ -e $header ]]; then
      echo "export CUDA_HOME='$home' PATH='$home/bin':\"\$PATH\""
      exit
    fi
  done
  echo "nvcc is installed in $home, cuDNN is not" >&2
fi
if [[ ${1:-} == --installed ]]; then
  echo "there is no CUDA toolkit with cuDNN: nvcc is looked for on the PATH and in CUDA_HOME" >&2
  exit 1
fi

dir=${1:?usage: toolkit.sh FOLDER}
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
if [[ ! -e $dir/complete ]]; then
  python3 -m venv "$dir/venv" >&2
  "$dir/venv/bin/pip" install -q --no-deps nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-cccl==13.0.85 nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88 nvidia-cublas==13.1.0.3 \
    nvidia-curand==10.4.0.35 nvidia-cudnn-cu13==9.19.0.56 >&2
  wheels=$(echo "$dir"/venv/lib/python3*/site-packages/nvidia)
  mkdir -p "$dir/lib64/stubs" "$dir/include"
  ln -sfn "$wheels/cu13/bin" "$dir/bin"
  ln -sfn "$wheels/cu13/nvvm" "$dir/nvvm"
  cp -r "$wheels"/cu13/include/. "$wheels"/cudnn/include/. "$dir/include"
  ln -sf "$wheels"/cu13/lib/*.a "$dir/lib64/"
  # Linkers look for the names without versions.
  for library in "$wheels"/{cu13,cudnn}/lib/*.so.*; do
    name=$(basename "$library")
    ln -sf "$library" "$dir/lib64/$name"
    ln -sf "$library" "$dir/lib64/${name%%.so*}.so"
  done
  # The driver comes with a GPU: to link, a library with its functions and no code.
  grep -oE '\bcu[A-Z][A-Za-z0-9_]*' "$dir/include/cuda.h" | sort -u | sed 's/.*/void &(void) {}/' |
    cc -w -shared -x c - -o "$dir/lib64/stubs/libcuda.so.1" -Wl,-soname,libcuda.so.1
  ln -sf libcuda.so.1 "$dir/lib64/stubs/libcuda.so"
  touch "$dir/complete"
fi
cat <<END
export CUDA_HOME='$dir' CUDA_PATH='$dir' CUDA_ROOT='$dir' CUDA_TOOLKIT_ROOT_DIR='$dir'
export PATH='$dir/bin':"\$PATH" LIBRARY_PATH='$dir/lib64:$dir/lib64/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}'
export RUSTFLAGS="${RUSTFLAGS:-} -C link-arg=-L$dir/lib64 -C link-arg=-L$dir/lib64/stubs"
# To run: not the stub of the driver.
export LD_LIBRARY_PATH='$dir/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}'
END
