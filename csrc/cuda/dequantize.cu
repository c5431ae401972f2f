// Launches of dequantize.cuh.
#include "cuda/dequantize.cuh"

namespace la_aciq::cuda {

cudaError_t dequantize(const uint8_t* codes, int64_t rows, int64_t k, const Clips& clips, Codebook codebook,
                       void* out, DType dtype, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const bool vectors =
      k % 8 == 0 && (clips.groups == 1 || clips.size % 8 == 0) && is_aligned(codes, 4) && is_aligned(out, 16);
  const RowTiles tiles = row_tiles(rows, ceil_divide(k, vectors ? 8 : 2));
  const DequantizeArgs args{codes, rows, k, clips, codebook, out};
  return with_type(dtype, [&]<class T>(Type<T>) {
    return launch(vectors ? dequantize_kernel<T, 8> : dequantize_kernel<T, 2>, tiles.grid, tiles.block, 0,
                  stream, args);
  });
}

}  // namespace la_aciq::cuda
