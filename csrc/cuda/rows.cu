// Launches of rows.cuh.
#include <math.h>

#include <numeric>
#include <type_traits>

#include "cuda/rows.cuh"

namespace la_aciq::cuda {
namespace {

constexpr int64_t kUsualSegment = 4096;  // longer only where a block or a group is

bool is_power_of_two(int64_t n) {
  return n > 0 && (n & (n - 1)) == 0;
}

int64_t block_of(const Rotation& rotation) {
  return rotation.signs == nullptr ? 1 : rotation.block;
}

struct Plan {
  int64_t segment;
  Grouping grouping;
  bool row_in_shared_memory;
  unsigned team, teams;
  int vectors, lanes_per_row;
  int64_t shared_bytes;
};

// codes: whether groups matter.
Plan plan_rows(int64_t k, const Rotation& rotation, const Clips& clips, Clip clip, bool codes, bool aligned) {
  Plan plan{};
  const int64_t block = block_of(rotation), padded = ceil_divide(k, 8) * 8;
  if (codes && clips.groups == 1) {
    plan.grouping = aligned ? Grouping::kRow : Grouping::kIrregular;
    plan.segment = padded;
  } else {
    const int64_t unit = std::lcm(std::lcm(block, codes ? clips.size : int64_t{1}), int64_t{8});
    plan.segment = unit >= padded ? padded : unit * (kUsualSegment > unit ? kUsualSegment / unit : 1);
    if (plan.segment > padded) plan.segment = padded;
    const bool lanes = is_power_of_two(clips.size) && clips.size >= 8 && clips.size <= 8 * kWarp;
    const bool looked_up = clip == Clip::kStatic && clips.size % 8 == 0;
    plan.grouping = aligned && (lanes || looked_up) ? Grouping::kLanes : Grouping::kIrregular;
  }
  const bool measured_there = codes && plan.grouping == Grouping::kIrregular && clip != Clip::kStatic;
  plan.row_in_shared_memory = block > 8 * kWarp || measured_there;

  const int64_t threads = ceil_divide(plan.segment / 8, kWarp) * kWarp;  // of one vector each
  if (threads <= kWarp) {
    plan.team = kWarp;
    plan.teams = 8;
    plan.vectors = 1;
  } else {
    plan.vectors = plan.segment > 2048 || !aligned ? 2 : 1;
    plan.team = static_cast<unsigned>(ceil_divide(ceil_divide(threads, plan.vectors), kWarp) * kWarp);
    plan.teams = 1;
  }
  const bool share_warps = aligned && plan.team == kWarp && plan.segment == k && is_power_of_two(k) &&
                           (!codes || plan.grouping != Grouping::kIrregular);
  plan.lanes_per_row = share_warps ? static_cast<int>(k / 8) : kWarp;
  const int groups = codes && plan.grouping == Grouping::kIrregular
                         ? static_cast<int>(ceil_divide(plan.segment, clips.size))
                         : 0;
  plan.shared_bytes = static_cast<int64_t>(sizeof(float)) * plan.teams *
                      shared_layout(static_cast<int>(plan.segment), plan.row_in_shared_memory, groups).total;
  return plan;
}

template <class T, class Out, Grouping kGrouping, int kVectors, bool kAligned, int kThreads>
cudaError_t launch_plan(const RowsArgs& args, const Plan& plan, cudaStream_t stream) {
  const auto kernel = rows_kernel<T, Out, kGrouping, kVectors, kAligned, kThreads>;
  if (plan.shared_bytes > 48 << 10) {
    // The device's limit and not this launch's size: another thread may be launching the same kernel with
    // less.
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    if (error != cudaSuccess) return error;
  }
  const int64_t rows_per_block = plan.teams * (kWarp / plan.lanes_per_row);
  const int64_t resident =
      device_attribute(cudaDevAttrMultiProcessorCount) * (2048 / (plan.team * plan.teams));
  const int64_t segments = ceil_divide(args.x.k, plan.segment),
                blocks = ceil_divide(args.x.rows, rows_per_block);
  const int64_t across = ceil_divide(resident, segments);
  return launch(
      kernel, dim3(static_cast<unsigned>(blocks < across ? blocks : across), static_cast<unsigned>(segments)),
      dim3(plan.team, plan.teams), static_cast<size_t>(plan.shared_bytes), stream, args);
}

template <class T, class Out, Grouping kGrouping>
cudaError_t launch_aligned(const RowsArgs& args, const Plan& plan, cudaStream_t stream) {
  if (plan.vectors == 1) return launch_plan<T, Out, kGrouping, 1, true, 256>(args, plan, stream);
  return plan.team <= 256 ? launch_plan<T, Out, kGrouping, 2, true, 256>(args, plan, stream)
                          : launch_plan<T, Out, kGrouping, 2, true, kLargestTeam>(args, plan, stream);
}

template <class T, class Out>
cudaError_t launch_rows(RowsArgs args, const Plan& plan, bool aligned, cudaStream_t stream) {
  args.segment = static_cast<int>(plan.segment);
  args.lanes_per_row = plan.lanes_per_row;
  args.row_in_shared_memory = plan.row_in_shared_memory;
  args.rotation_scale = static_cast<float>(1.0 / sqrt(static_cast<double>(block_of(args.rotation))));
  constexpr bool kCodes = std::is_same_v<Out, void>;
  if constexpr (kCodes) {
    if (plan.grouping == Grouping::kRow) return launch_aligned<T, Out, Grouping::kRow>(args, plan, stream);
    if (plan.grouping == Grouping::kLanes)
      return launch_aligned<T, Out, Grouping::kLanes>(args, plan, stream);
  } else if (aligned) {
    return launch_aligned<T, Out, Grouping::kIrregular>(args, plan, stream);
  }
  constexpr int kTeam = kCodes ? kLargestIrregularTeam : kLargestTeam;
  if (plan.vectors == 1) {
    return aligned ? launch_plan<T, Out, Grouping::kIrregular, 1, true, 256>(args, plan, stream)
                   : launch_plan<T, Out, Grouping::kIrregular, 1, false, 256>(args, plan, stream);
  }
  return aligned ? launch_plan<T, Out, Grouping::kIrregular, 2, true, kTeam>(args, plan, stream)
                 : launch_plan<T, Out, Grouping::kIrregular, 2, false, kTeam>(args, plan, stream);
}

bool fits(const Plan& plan, bool codes) {
  const int team = codes && plan.grouping == Grouping::kIrregular ? kLargestIrregularTeam : kLargestTeam;
  return plan.segment <= 16 * team &&
         plan.shared_bytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

}  // namespace

bool row_fits(const Matrix& x, const Rotation& rotation, const Clips& clips, Clip clip) {
  const bool aligned = rows_are_aligned(x);
  return fits(plan_rows(x.k, rotation, clips, clip, /*codes=*/true, aligned), /*codes=*/true);
}

bool block_fits(int64_t block) {
  return fits(plan_rows(block, Rotation{&block, false, block}, Clips{}, Clip::kStatic, /*codes=*/false,
                        /*aligned=*/true),
              /*codes=*/false);
}

cudaError_t rotate(const Matrix& x, const Rotation& rotation, void* out, DType out_dtype,
                   cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  const bool aligned = rows_are_aligned(x) && is_aligned(out, 16);
  const Plan plan = plan_rows(x.k, rotation, Clips{}, Clip::kStatic, /*codes=*/false, aligned);
  RowsArgs args{};
  args.x = x;
  args.rotation = rotation;
  args.clips.size = x.k;
  args.out = out;
  return with_type(x.dtype, [&]<class T>(Type<T>) {
    if (out_dtype == x.dtype) return launch_rows<T, T>(args, plan, aligned, stream);
    return out_dtype == DType::kFloat32 ? launch_rows<T, float>(args, plan, aligned, stream)
                                        : cudaErrorInvalidValue;
  });
}

cudaError_t quantize_rows(const Matrix& x, const Rotation& rotation, const Clips& clips, Clip clip,
                          Codebook codebook, uint8_t* codes, float* row_clips, cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  const bool aligned = rows_are_aligned(x) && is_aligned(codes, 4);
  const Plan plan = plan_rows(x.k, rotation, clips, clip, /*codes=*/true, aligned);
  RowsArgs args{};
  args.x = x;
  args.rotation = rotation;
  args.clips = clips;
  args.clip = clip;
  args.codebook = codebook;
  args.codes = codes;
  args.row_clips = row_clips;
  return with_type(x.dtype,
                   [&]<class T>(Type<T>) { return launch_rows<T, void>(args, plan, aligned, stream); });
}

cudaError_t measure_clips(const Matrix& x, const Clips& clips, Clip clip, float* row_clips,
                          cudaStream_t stream) {
  if (x.rows == 0) return cudaSuccess;
  const MeasureArgs args{x, clips, clip, row_clips};
  const dim3 grid(static_cast<unsigned>(ceil_divide(x.rows * clips.groups, 256 / kWarp)));
  return with_type(x.dtype, [&]<class T>(Type<T>) {
    return launch(measure_clips_kernel<T>, grid, dim3(256), 0, stream, args);
  });
}

}  // namespace la_aciq::cuda
