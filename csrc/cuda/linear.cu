// Launches of linear.cuh.
#include "cuda/linear.cuh"

namespace la_aciq::cuda {
namespace {

constexpr int64_t kUsualBlocks = 256;  // fewer than this, and K is cut to make more

// Words of 8 codes that a lane reads at a time: as many as K and the groups allow; 0 for none.
int words_per_lane(const Matrix& x, const Weights& weights) {
  for (const int words : {4, 2, 1}) {
    const int64_t chunk = 32 * words;
    if (x.k % chunk == 0 && (weights.groups == 1 || weights.group_size % chunk == 0)) return words;
  }
  return 0;
}

struct Plan {
  int words, output_tiles;
  int64_t blocks, splits, chunks_per_split;
};

Plan plan_linear(const Matrix& x, const Weights& weights) {
  Plan plan{};
  plan.words = words_per_lane(x, weights);
  // Two tiles read x half as often, which starts to matter as x grows.
  plan.output_tiles = x.rows > 4 ? 2 : 1;
  plan.blocks = ceil_divide(weights.n, 16 * plan.output_tiles);
  const int64_t chunks = x.k / (32 * plan.words), most = ceil_divide(chunks, kChunksInFlight * kLinearWarps);
  const int64_t wanted = ceil_divide(kUsualBlocks, 2 * plan.blocks);
  plan.splits = wanted < most ? wanted : most;
  plan.chunks_per_split = ceil_divide(chunks, plan.splits);
  plan.splits = ceil_divide(chunks, plan.chunks_per_split);
  return plan;
}

template <class T, int kWords, int kOutputTiles, int kRowTiles>
cudaError_t launch_linear(const LinearArgs& args, const Plan& plan, cudaStream_t stream) {
  return launch(linear_kernel<T, kWords, kOutputTiles, kRowTiles>,
                dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits)),
                dim3(kLinearWarps * kWarp), sizeof(float) * kLinearWarps * 16 * kOutputTiles * 8 * kRowTiles,
                stream, args);
}

template <class T, int kWords>
cudaError_t launch_words(const LinearArgs& args, const Plan& plan, cudaStream_t stream) {
  if (plan.output_tiles == 1) return launch_linear<T, kWords, 1, 1>(args, plan, stream);
  return args.x.rows <= 8 ? launch_linear<T, kWords, 2, 1>(args, plan, stream)
                          : launch_linear<T, kWords, 2, 2>(args, plan, stream);
}

template <class T>
cudaError_t launch_type(const LinearArgs& args, const Plan& plan, cudaStream_t stream) {
  const cudaError_t error = plan.words == 4   ? launch_words<T, 4>(args, plan, stream)
                            : plan.words == 2 ? launch_words<T, 2>(args, plan, stream)
                                              : launch_words<T, 1>(args, plan, stream);
  if (error != cudaSuccess || plan.splits == 1) return error;
  const dim3 grid(static_cast<unsigned>(ceil_divide(args.x.rows * args.weights.n, 256)));
  return launch(add_splits_kernel<T>, grid, dim3(256), 0, stream, args, static_cast<int>(plan.splits));
}

}  // namespace

bool linear_fits(const Matrix& x, const Weights& weights) {
  return (x.dtype == DType::kBFloat16 || x.dtype == DType::kFloat16) && x.rows <= kLinearRows &&
         words_per_lane(x, weights) > 0 && is_aligned(x.data, 16) && (x.rows <= 1 || x.stride % 8 == 0) &&
         is_aligned(weights.codes, 16);
}

int64_t linear_partials(const Matrix& x, const Weights& weights) {
  const int64_t splits = plan_linear(x, weights).splits;
  return splits == 1 ? 0 : splits * x.rows * weights.n;
}

cudaError_t linear(const Matrix& x, const Weights& weights, const float* bias, void* out, float* partials,
                   cudaStream_t stream) {
  if (x.rows == 0 || weights.n == 0) return cudaSuccess;
  const Plan plan = plan_linear(x, weights);
  const LinearArgs args{x, weights, plan.chunks_per_split, bias, out, plan.splits == 1 ? nullptr : partials};
  return x.dtype == DType::kBFloat16 ? launch_type<__nv_bfloat16>(args, plan, stream)
                                     : launch_type<__half>(args, plan, stream);
}

}  // namespace la_aciq::cuda
