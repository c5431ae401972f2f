// Launches of quantize.cuh.
#include "cuda/quantize.cuh"

namespace la_aciq::cuda {
namespace {

bool takes_vectors(const Matrix& x, const Clips& clips, const void* out, int64_t out_bytes) {
  return rows_are_aligned(x) && (clips.groups == 1 || clips.size % 8 == 0) && is_aligned(out, out_bytes);
}

template <bool kCodes>
cudaError_t launch_elementwise(const ElementwiseArgs& args, bool vectors, cudaStream_t stream) {
  if (args.x.rows == 0) return cudaSuccess;
  const RowTiles tiles = row_tiles(args.x.rows, ceil_divide(args.x.k, vectors ? 8 : 2));
  return with_type(args.x.dtype, [&]<class T>(Type<T>) {
    return launch(vectors ? quantize_kernel<T, 8, kCodes> : quantize_kernel<T, 2, kCodes>, tiles.grid,
                  tiles.block, 0, stream, args);
  });
}

int64_t pieces_of(const Matrix& x, bool vectors) {
  return ceil_divide(x.k, vectors ? 8 : 2);
}

}  // namespace

cudaError_t quantize(const Matrix& x, const Clips& clips, Codebook codebook, uint8_t* codes,
                     cudaStream_t stream) {
  const ElementwiseArgs args{x, clips, codebook, 4, codes, nullptr};
  return launch_elementwise<true>(args, takes_vectors(x, clips, codes, 4), stream);
}

cudaError_t round_to_codebook(const Matrix& x, const Clips& clips, Codebook codebook, int bits, void* values,
                              cudaStream_t stream) {
  const ElementwiseArgs args{x, clips, codebook, bits, nullptr, values};
  return launch_elementwise<false>(args, takes_vectors(x, clips, values, 16), stream);
}

int64_t tail_partials_size(const Matrix& x, const Clips& clips, const SortedRows& sorted) {
  const int64_t slots = ceil_divide(x.rows, kTailRows) + sorted.num_entries;
  return slots * pieces_of(x, rows_are_aligned(x) && (clips.groups == 1 || clips.size % 8 == 0)) *
         static_cast<int64_t>(sizeof(TailPartial));
}

cudaError_t quantize_tails(const Matrix& x, const Clips& clips, const SortedRows& sorted, Codebook codebook,
                           uint8_t* codes, double* tail, void* partials, cudaStream_t stream) {
  const bool vectors = takes_vectors(x, clips, codes, 4);
  const int64_t pieces = pieces_of(x, vectors);
  const TailArgs args{x, clips, sorted, codebook, codes, static_cast<TailPartial*>(partials)};
  if (x.rows > 0) {
    const dim3 grid(static_cast<unsigned>(ceil_divide(x.rows, kTailRows)),
                    static_cast<unsigned>(ceil_divide(pieces, kTailThreads)));
    const cudaError_t error = with_type(x.dtype, [&]<class T>(Type<T>) {
      return launch(vectors ? quantize_tails_kernel<T, 8> : quantize_tails_kernel<T, 2>, grid,
                    dim3(kTailThreads), 0, stream, args);
    });
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(clips.groups),
                  static_cast<unsigned>(sorted.num_entries < 65535 ? sorted.num_entries : 65535));
  return launch(vectors ? merge_tails_kernel<8> : merge_tails_kernel<2>, grid, dim3(kTailThreads),
                sizeof(double) * 4 * kTailThreads / kWarp, stream, args, tail);
}

}  // namespace la_aciq::cuda
