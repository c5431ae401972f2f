// Launches of moments.cuh.
#include "cuda/moments.cuh"

namespace la_aciq::cuda {
namespace {

MomentArgs arguments_of(const Matrix& x, const SortedRows& sorted) {
  MomentArgs args{};
  args.x = x;
  args.sorted = sorted;
  args.pieces = ceil_divide(x.k, kMomentPiece);
  args.piece = args.pieces == 1 ? x.k : ceil_divide(ceil_divide(x.k, args.pieces), 8) * 8;
  const int64_t share = ceil_divide(x.rows * x.k, kMomentTiles);
  args.tile = ceil_divide(share > kMomentTileElements ? share : kMomentTileElements, args.piece);
  args.tiles = ceil_divide(x.rows * args.pieces, args.tile);
  return args;
}

template <class T, bool kAligned>
cudaError_t launch_moments(const MomentArgs& args, cudaStream_t stream) {
  constexpr int kWarps = kMomentThreads / kWarp;
  const dim3 grid(static_cast<unsigned>(ceil_divide(args.tiles, kWarps))), block(kMomentThreads);
  if (args.histogram == nullptr)
    return launch(moments_kernel<T, kAligned, false>, grid, block, 0, stream, args);
  return launch(moments_kernel<T, kAligned, true>, grid, block,
                sizeof(uint32_t) * 2 * kHistogramBins * kWarps, stream, args);
}

}  // namespace

int64_t moment_partials(const Matrix& x, const SortedRows& sorted) {
  return (x.rows * x.k == 0 ? 0 : arguments_of(x, sorted).tiles) + sorted.num_entries;
}

cudaError_t moments(const Matrix& x, const SortedRows& sorted, MomentState* states, int64_t* histogram,
                    MomentState* partials, cudaStream_t stream) {
  if (histogram != nullptr) {
    const auto bytes = static_cast<size_t>(sorted.num_entries) * 2 * kHistogramBins * sizeof(int64_t);
    const cudaError_t error = cudaMemsetAsync(histogram, 0, bytes, stream);
    if (error != cudaSuccess) return error;
  }
  MomentArgs args{};
  args.tile = args.pieces = 1;
  args.sorted = SortedRows{nullptr, nullptr, 0, 1, sorted.num_entries};
  if (x.rows * x.k > 0) {
    args = arguments_of(x, sorted);
    args.partials = partials;
    args.histogram = reinterpret_cast<unsigned long long*>(histogram);
    const cudaError_t error = x.dtype == DType::kFloat64
                                  ? launch_moments<double, false>(args, stream)
                                  : with_type(x.dtype, [&]<class T>(Type<T>) {
                                      return rows_are_aligned(x) ? launch_moments<T, true>(args, stream)
                                                                 : launch_moments<T, false>(args, stream);
                                    });
    if (error != cudaSuccess) return error;
  }
  const int64_t per_entry = ceil_divide(args.tiles, sorted.num_entries);
  const int64_t warps =
      per_entry < kMergeThreads / 2 ? ceil_divide(per_entry + 1, 2 * kWarp) : kMergeThreads / kWarp;
  return launch(merge_moments_kernel, dim3(static_cast<unsigned>(sorted.num_entries)),
                dim3(static_cast<unsigned>(warps * kWarp)), static_cast<size_t>(warps) * sizeof(MomentState),
                stream, args, states);
}

}  // namespace la_aciq::cuda
