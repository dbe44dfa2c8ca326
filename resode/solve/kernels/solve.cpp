// Error-controlled Runge-Kutta steps by rows; resode/solve/kernels/source.py fills the places between @.
#include <torch/csrc/inductor/cpp_prefix.h>
#include <ATen/cpu/vec/vec.h>  // the prefix has it only where there are vector instructions
#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

namespace {

using S = @SCALAR@;
using V = at::vec::Vectorized<S>;
using D = at::vec::Vectorized<double>;

constexpr int W = V::size();             // lanes
constexpr int N = @N_STATE@;             // entries of a row
constexpr int STAGES = @N_STAGES@;       // that the new state needs
constexpr int K = STAGES + 1;            // and the one at the step's end
constexpr int SHARED = @N_SHARED@, OWN = @N_OWN@, POWERS = @POWERS@;
constexpr long SHARED_TABLE[][2] = {@SHARED_TABLE@};   // input, offset
constexpr long OWN_TABLE[][3] = {@OWN_TABLE@};         // input, offset, stride
constexpr int STANDSTILLS = 20;

struct Job {
  // As the caller fills it, field by field.
  long rows, outputs, own_outputs, max_steps, threads, shared_step;
  double forward, rtol, atol, min_step, max_step, longest, safety, shrink, grow, b1, b2, b3, power;
  S *x, *k0;             // (rows, N), in and out
  double* state;         // (7, rows), in and out: time, step, last two errors, rejected?, accepted, rejected
  const double* end;     // (rows)
  const double* at;      // the outputs' times: (outputs), or (rows, outputs)
  S* path;               // (outputs, rows, N)
  const S* const* inputs;
  // The way back alone:
  const S *path_bar, *x_end_bar;   // cotangents of path and of the last state
  S* x_bar;                        // of the first state, out
  S* const* inputs_bar;            // of the inputs, out, added to
};

using Steps = std::vector<std::pair<double, double>>;  // start and size > 0 of the steps that a row took

inline V load(const S* from) { return V::loadu(from); }

#define INLINE inline __attribute__((always_inline))
#define NOT_INLINE __attribute__((noinline))

@INLINE_FIELD@ void field(const V& t, const V* x, const S* shared, const V* own, V* dx) {
@FIELD@
}

#if @WAY_BACK@
@INLINE_FIELD@ void pull(const V& t, const V* x, const S* shared, const V* own, const V* bar, V* xbar,
                        V* sharedbar, V* ownbar) {
@PULL@
}
#endif

// Times of a step's stages, in each lane; a rounding must not take one beyond the end.
struct Times {
  const double *start, *size, *end;
  double forward;
  INLINE V operator()(double c) const {
    alignas(64) S s[W];
    for (int l = 0; l < W; ++l) {
      double t = start[l] + c * (forward * size[l]);
      s[l] = S(forward > 0 ? std::min(t, end[l]) : std::max(t, end[l]));
    }
    return load(s);
  }
};

// The stages and the state at the step's end; the first stage is there.
static INLINE void step(const Times& times, const V& t_end, const V& h, const V* x, const S* shared,
                        const V* own, V (*k)[N], V* x1) {
  V z[N];
@STAGES@
}

// Σ (estimate / tolerance)² of each lane; not finite where the state or a stage is not.
static INLINE void squares(const Job& job, const V& h, const V* x, const V* x1, V (*k)[N], double* sum) {
  V total(0), poison(0);
  const V rtol{S(job.rtol)}, atol{S(job.atol)};
  alignas(64) S each[W];
  for (int l = 0; l < W; ++l) sum[l] = 0;
  for (int j = 0; j < N; ++j) {
    V scale = at::vec::fmadd(at::vec::maximum(x[j].abs(), x1[j].abs()), rtol, atol);
    V ratio = h * (@ERROR@) / scale;
    poison = poison + V(0) * x1[j] + V(0) * k[K - 1][j];
    ratio.store(each);
    for (int l = 0; l < W; ++l) sum[l] += double(each[l]) * double(each[l]);
  }
  poison.store(each);
  for (int l = 0; l < W; ++l) sum[l] = (std::isinf(sum[l]) ? 1e300 : sum[l]) + double(each[l]);
}

static INLINE void coefficients(const V& h, const V* x, const V* x1, V (*k)[N], V (*c)[N]) {
  for (int j = 0; j < N; ++j) {
    @POLYNOMIAL@
  }
}

static void exponentials(double* a, bool logarithm) {
  for (int l = 0; l < W; l += D::size()) {
    D v = D::loadu(a + l);
    (logarithm ? v.log() : v.exp()).store(a + l);
  }
}

// The rule of steps, `control.plan` and `control.decide`, for W clocks.
struct Clocks {
  alignas(64) double time[W], step[W], end[W], size[W], goal[W], error[W], last[W], older[W], factor[W];
  bool reaches[W], active[W], rejected[W], keep[W], failed[W], stuck[W];
  long accepted[W], refused[W], still[W];

  void set(const Job& job, int l, long row) {
    const double* s = job.state;
    const long b = job.shared_step ? 1 : job.rows;
    time[l] = s[row];
    step[l] = s[b + row];
    last[l] = std::log(s[2 * b + row]);
    older[l] = std::log(s[3 * b + row]);
    rejected[l] = s[4 * b + row] > 0;
    accepted[l] = long(s[5 * b + row]);
    refused[l] = long(s[6 * b + row]);
    end[l] = job.end[row];
    still[l] = 0;
  }

  void get(const Job& job, int l, long row) const {
    double* s = job.state;
    const long b = job.shared_step ? 1 : job.rows;
    const double values[] = {time[l], step[l], std::exp(last[l]), std::exp(older[l]), double(rejected[l]),
                             double(accepted[l]), double(refused[l])};
    for (int i = 0; i < 7; ++i) s[i * b + row] = values[i];
  }

  void idle(int l) {
    time[l] = end[l] = 0;
    step[l] = 1;
    last[l] = older[l] = 0;
    rejected[l] = false;
    accepted[l] = refused[l] = still[l] = 0;
  }

  // Whether some clock can't go on: no step left to take, or none that time resolves.
  bool plan(const Job& job) {
    bool trouble = false;
    for (int l = 0; l < W; ++l) {
      double left = (end[l] - time[l]) * job.forward;
      active[l] = left > 0;
      reaches[l] = (step[l] * 1.01 >= left) & (left <= job.longest);
      size[l] = active[l] ? (reaches[l] ? left : step[l]) : 0.0;
      goal[l] = reaches[l] ? end[l] : time[l] + job.forward * size[l];
      trouble |= active[l] & ((goal[l] == time[l]) | (accepted[l] + refused[l] >= job.max_steps));
    }
    return trouble;
  }

  // From the errors over the tolerance; whether some clock can't go on.
  bool decide(const Job& job) {
    for (int l = 0; l < W; ++l) {
      failed[l] = active[l] & !std::isfinite(error[l]);
      keep[l] = active[l] & !failed[l] & ((error[l] <= 1) | ((job.min_step > 0) & (size[l] <= job.min_step * 1.01)));
      error[l] = failed[l] | !active[l] ? 1.0 : std::max(error[l], 1e-10);
    }
    exponentials(error, true);
    for (int l = 0; l < W; ++l)
      factor[l] = keep[l] ? -job.b1 * error[l] - job.b2 * last[l] - job.b3 * older[l] : -job.power * error[l];
    exponentials(factor, false);
    bool trouble = false;
    for (int l = 0; l < W; ++l) {
      double f = std::min(std::max(job.safety * factor[l], job.shrink), job.grow);
      f = rejected[l] | !keep[l] ? std::min(f, 1.0) : f;
      double next = size[l] * f;
      next = keep[l] & reaches[l] ? std::max(next, step[l]) : next;
      next = std::min(std::max(next, job.min_step), job.max_step);
      next = failed[l] ? size[l] * job.shrink : next;
      double now = keep[l] ? goal[l] : time[l];
      double smallest = 4 * 2.220446049250313e-16 * std::max(std::abs(now), 1e8 * 2.2250738585072014e-308);
      stuck[l] = active[l] & ((!keep[l] & (next <= smallest)) | (failed[l] & (size[l] <= job.min_step)));
      trouble |= stuck[l];
      step[l] = active[l] ? next : step[l];
      older[l] = keep[l] ? last[l] : older[l];
      last[l] = keep[l] ? error[l] : last[l];
      rejected[l] = active[l] ? !keep[l] : rejected[l];
      accepted[l] += keep[l];
      refused[l] += active[l] & !keep[l];
    }
    return trouble;
  }

  V sizes(const Job& job) const {
    alignas(64) S h[W];
    for (int l = 0; l < W; ++l) h[l] = S(job.forward * size[l]);
    return load(h);
  }

  V goals() const {
    alignas(64) S t[W];
    for (int l = 0; l < W; ++l) t[l] = S(goal[l]);
    return load(t);
  }

  // Whether the state would stand still at the next smaller step.
  void look_at_failed(const Job& job, const S (*x)[W], const S (*k0)[W]) {
    for (int l = 0; l < W; ++l) {
      if (!failed[l]) continue;
      bool same = true, zero = true;
      S h = S(job.forward * job.shrink * step[l]);
      for (int j = 0; j < N; ++j) {
        same &= x[j][l] + h * k0[j][l] == x[j][l];
        zero &= k0[j][l] == 0;
      }
      still[l] += same & !zero;
    }
  }
};

static const double* outputs_of(const Job& job, long row) {
  return job.own_outputs ? job.at + row * job.outputs : job.at;
}

static void gather(S* shared, const Job& job) {
  for (int i = 0; i < SHARED; ++i) shared[i] = job.inputs[SHARED_TABLE[i][0]][SHARED_TABLE[i][1]];
}

static void own_of(const Job& job, long row, int l, S (*own)[W]) {
  for (int i = 0; i < OWN; ++i)
    own[i][l] = job.inputs[OWN_TABLE[i][0]][OWN_TABLE[i][1] + OWN_TABLE[i][2] * row];
}

template <int M>
static INLINE void lanes(const S (*from)[W], V* to) {
  for (int j = 0; j < M; ++j) to[j] = load(from[j]);
}

// States at the outputs between time and goal of each lane that kept its step.
static void write_outputs(const Job& job, const double* time, const double* goal, const bool* keep, const long* row,
                          long* next, const V* x, V (*c)[N]) {
  for (;;) {
    alignas(64) S theta[W];
    bool any = false, wanted[W];
    for (int l = 0; l < W; ++l) {
      wanted[l] = false;
      theta[l] = 0;
      if (!keep[l] || next[l] >= job.outputs) continue;
      double t = outputs_of(job, row[l])[next[l]];
      if (job.forward * t > job.forward * goal[l]) continue;
      double size = goal[l] - time[l];
      theta[l] = S(std::min(std::max((t - time[l]) / (size == 0 ? 1.0 : size), 0.0), 1.0));
      any = wanted[l] = true;
    }
    if (!any) return;
    V th = load(theta);
    for (int j = 0; j < N; ++j) {
      V value = c[POWERS - 1][j];
      for (int p = POWERS - 2; p >= 0; --p) value = at::vec::fmadd(value, th, c[p][j]);
      value = at::vec::fmadd(value, th, x[j]);
      alignas(64) S each[W];
      value.store(each);
      for (int l = 0; l < W; ++l)
        if (wanted[l]) job.path[(next[l] * job.rows + row[l]) * N + j] = each[l];
    }
    for (int l = 0; l < W; ++l) next[l] += wanted[l];
  }
}

static long first_output(const Job& job, long row, double time, bool write) {
  long next = 0;
  const double* at_ = outputs_of(job, row);
  while (next < job.outputs && job.forward * at_[next] <= job.forward * time) {
    if (write)
      for (int j = 0; j < N; ++j) job.path[(next * job.rows + row) * N + j] = job.x[row * N + j];
    ++next;
  }
  return next;
}

// Rows `from` to `to`, each in its own steps; false where one can't go on. `taken`, if given, has one list a row.
static bool solve_rows(const Job& job, const S* shared, long from, long to, Steps* taken, bool write) {
  Clocks clocks;
  alignas(64) S x[N][W], k0[N][W], own[OWN + 1][W];
  long row[W], next[W], coming = from, busy = 0;
  auto start = [&](int l) {
    if (coming >= to) {
      row[l] = -1;
      next[l] = job.outputs;
      clocks.idle(l);
      return;
    }
    row[l] = coming++;
    ++busy;
    for (int j = 0; j < N; ++j) {
      x[j][l] = job.x[row[l] * N + j];
      k0[j][l] = job.k0[row[l] * N + j];
    }
    own_of(job, row[l], l, own);
    clocks.set(job, l, row[l]);
    next[l] = write ? first_output(job, row[l], clocks.time[l], true) : job.outputs;
  };
  auto put = [&](int l) {
    if (row[l] < 0) return;
    if (write) {
      for (int j = 0; j < N; ++j) {
        job.x[row[l] * N + j] = x[j][l];
        job.k0[row[l] * N + j] = k0[j][l];
      }
      clocks.get(job, l, row[l]);
    }
    --busy;
  };
  for (int l = 0; l < W; ++l) {
    for (int j = 0; j < N; ++j) x[j][l] = k0[j][l] = 0;
    for (int i = 0; i < OWN; ++i) own[i][l] = 1;
    start(l);
  }
  bool sound = true;
  while (busy) {
    for (int l = 0; l < W; ++l)
      while (row[l] >= 0 && !((clocks.end[l] - clocks.time[l]) * job.forward > 0)) {
        put(l);
        start(l);
      }
    if (!busy) break;
    if (clocks.plan(job)) {
      sound = false;
      break;
    }
    const V h = clocks.sizes(job);
    const Times times{clocks.time, clocks.size, clocks.end, job.forward};
    V xv[N], x1[N], k[K][N], ownv[OWN + 1], c[POWERS][N];
    lanes<N>(x, xv);
    lanes<N>(k0, k[0]);
    lanes<OWN>(own, ownv);
    step(times, clocks.goals(), h, xv, shared, ownv, k, x1);
    squares(job, h, xv, x1, k, clocks.error);
    for (int l = 0; l < W; ++l) clocks.error[l] = std::sqrt(clocks.error[l] / N);
    sound = !clocks.decide(job);
    bool any_failed = false, passed = false;
    for (int l = 0; l < W; ++l) {
      any_failed |= clocks.failed[l];
      passed |= clocks.keep[l] && next[l] < job.outputs &&
                job.forward * outputs_of(job, row[l])[next[l]] <= job.forward * clocks.goal[l];
      if (taken && clocks.keep[l]) taken[row[l] - from].emplace_back(clocks.time[l], clocks.size[l]);
    }
    if (passed) {
      coefficients(h, xv, x1, k, c);
      write_outputs(job, clocks.time, clocks.goal, clocks.keep, row, next, xv, c);
    }
    alignas(64) S new_x[N][W], new_k[N][W];
    for (int j = 0; j < N; ++j) {
      x1[j].store(new_x[j]);
      k[K - 1][j].store(new_k[j]);
      for (int l = 0; l < W; ++l) {
        x[j][l] = clocks.keep[l] ? new_x[j][l] : x[j][l];
        k0[j][l] = clocks.keep[l] ? new_k[j][l] : k0[j][l];
      }
    }
    for (int l = 0; l < W; ++l) clocks.time[l] = clocks.keep[l] ? clocks.goal[l] : clocks.time[l];
    if (any_failed) {
      clocks.look_at_failed(job, x, k0);
      for (int l = 0; l < W; ++l) sound &= clocks.still[l] < STANDSTILLS;
    }
    if (!sound) break;
  }
  for (int l = 0; l < W; ++l) put(l);
  return sound;
}

// All rows in the same steps; false where they can't go on.
static bool solve_whole(const Job& job, const S* shared, Steps* taken, bool write) {
  const long chunks = (job.rows + W - 1) / W;
  struct Chunk {
    alignas(64) S x[N][W], own[OWN + 1][W];
    V k[K][N], x1[N];
  };
  std::vector<Chunk> all(chunks);
  Clocks clocks;
  for (int l = 0; l < W; ++l) clocks.idle(l);
  clocks.set(job, 0, 0);
  for (long q = 0; q < chunks; ++q) {
    alignas(64) S k0[N][W];
    for (int l = 0; l < W; ++l) {
      const long row = std::min(q * W + l, job.rows - 1);
      for (int j = 0; j < N; ++j) {
        all[q].x[j][l] = job.x[row * N + j];
        k0[j][l] = job.k0[row * N + j];
      }
      own_of(job, row, l, all[q].own);
    }
    lanes<N>(k0, all[q].k[0]);
  }
  long next = 0;
  if (write)
    for (long row = 0; row < job.rows; ++row) next = first_output(job, row, clocks.time[0], true);
  bool sound = true;
  while ((clocks.end[0] - clocks.time[0]) * job.forward > 0) {
    if (clocks.plan(job)) {
      sound = false;
      break;
    }
    double start[W], size[W], end[W], sums[W], total = 0;
    for (int l = 0; l < W; ++l) start[l] = clocks.time[0], size[l] = clocks.size[0], end[l] = clocks.end[0];
    const Times times{start, size, end, job.forward};
    const V h{S(job.forward * clocks.size[0])}, goal{S(clocks.goal[0])};
    for (long q = 0; q < chunks; ++q) {
      V xv[N], ownv[OWN + 1];
      lanes<N>(all[q].x, xv);
      lanes<OWN>(all[q].own, ownv);
      step(times, goal, h, xv, shared, ownv, all[q].k, all[q].x1);
      squares(job, h, xv, all[q].x1, all[q].k, sums);
      for (int l = 0; l < W; ++l) total += q * W + l < job.rows ? sums[l] : 0.0;
    }
    clocks.error[0] = std::sqrt((std::isinf(total) ? 1e300 : total) / (double(job.rows) * N));
    sound = !clocks.decide(job);
    const bool keep = clocks.keep[0];
    if (taken && keep) taken->emplace_back(clocks.time[0], clocks.size[0]);
    if (keep && write && next < job.outputs && job.forward * job.at[next] <= job.forward * clocks.goal[0]) {
      long after = next;
      for (long q = 0; q < chunks; ++q) {
        V xv[N], c[POWERS][N];
        long rows[W], from[W];
        bool kept[W];
        double goals[W];
        for (int l = 0; l < W; ++l)
          rows[l] = q * W + l, from[l] = next, kept[l] = rows[l] < job.rows, goals[l] = clocks.goal[0];
        lanes<N>(all[q].x, xv);
        coefficients(h, xv, all[q].x1, all[q].k, c);
        write_outputs(job, start, goals, kept, rows, from, xv, c);
        after = from[0];
      }
      next = after;
    }
    if (keep) {
      for (long q = 0; q < chunks; ++q)
        for (int j = 0; j < N; ++j) {
          all[q].x1[j].store(all[q].x[j]);
          all[q].k[0][j] = all[q].k[K - 1][j];
        }
      clocks.time[0] = clocks.goal[0];
    }
    if (clocks.failed[0]) {
      bool same = true, zero = true;
      const V h0{S(job.forward * job.shrink * clocks.step[0])};
      for (long q = 0; q < chunks; ++q)
        for (int j = 0; j < N; ++j) {
          alignas(64) S moved[W], slope[W];
          (load(all[q].x[j]) + h0 * all[q].k[0][j]).store(moved);
          all[q].k[0][j].store(slope);
          for (int l = 0; l < W; ++l) same &= moved[l] == all[q].x[j][l], zero &= slope[l] == 0;
        }
      clocks.still[0] += same & !zero;
      sound &= clocks.still[0] < STANDSTILLS;
    }
    if (!sound) break;
  }
  if (write) {
    for (long q = 0; q < chunks; ++q)
      for (int j = 0; j < N; ++j) {
        alignas(64) S slope[W];
        all[q].k[0][j].store(slope);
        for (int l = 0; l < W && q * W + l < job.rows; ++l) {
          job.x[(q * W + l) * N + j] = all[q].x[j][l];
          job.k0[(q * W + l) * N + j] = slope[l];
        }
      }
    clocks.get(job, 0, 0);
  }
  return sound;
}

#if @WAY_BACK@
// Cotangents of W rows (−1 for none), from the end to the start of the steps that they took.
static void rows_back(const Job& job, const S* shared, const long* row, const Steps* const* taken, V* sharedbar) {
  alignas(64) S first[N][W], own[OWN + 1][W], bar[N][W];
  double start0[W], end[W];
  size_t most = 0;
  for (int l = 0; l < W; ++l) {
    const long r = std::max(row[l], 0L);
    const long clock = job.shared_step ? 0 : r;
    start0[l] = job.state[clock];
    end[l] = job.end[clock];
    for (int j = 0; j < N; ++j) {
      first[j][l] = job.x[r * N + j];
      bar[j][l] = row[l] < 0 ? S(0) : job.x_end_bar[r * N + j];
    }
    own_of(job, r, l, own);
    if (row[l] >= 0) most = std::max(most, taken[l]->size());
  }
  V ownv[OWN + 1], ownbar[OWN + 1], x[N], xbar[N], k[K][N], z[STAGES][N], x1[N];
  lanes<OWN>(own, ownv);
  lanes<N>(first, x);
  lanes<N>(bar, xbar);
  for (int i = 0; i < OWN; ++i) ownbar[i] = V(0);
  std::vector<V> states((most + 1) * N);
  double time[W], size[W];
  long last_output[W];
  auto at_step = [&](size_t s) {
    for (int l = 0; l < W; ++l) {
      const bool has = row[l] >= 0 && s < taken[l]->size();
      time[l] = has ? (*taken[l])[s].first : start0[l];
      size[l] = has ? (*taken[l])[s].second : 0.0;
    }
  };
  auto size_of = [&] {
    alignas(64) S h[W];
    for (int l = 0; l < W; ++l) h[l] = S(job.forward * size[l]);
    return load(h);
  };
  const Times times{time, size, end, job.forward};
  for (size_t s = 0; s < most; ++s) {
    for (int j = 0; j < N; ++j) states[s * N + j] = x[j];
    at_step(s);
    const V h = size_of();
    field(times(0.0), x, shared, ownv, k[0]);
    @REPLAY@
    for (int j = 0; j < N; ++j) x[j] = x1[j];
  }
  for (int l = 0; l < W; ++l) last_output[l] = row[l] < 0 ? -1 : job.outputs - 1;
  V kbar[K][N], k0bar[N], cbar[POWERS][N], start[N];
  for (int j = 0; j < N; ++j) k0bar[j] = V(0);
  for (size_t s = most; s-- > 0;) {
    at_step(s);
    const V h = size_of(), t_end = times(1.0);
    for (int j = 0; j < N; ++j) x[j] = states[s * N + j];
    field(times(0.0), x, shared, ownv, k[0]);
    @REPLAY@
    alignas(64) S sum[N][W] = {}, parts[POWERS][N][W] = {};
    for (int l = 0; l < W; ++l) {
      if (size[l] == 0) continue;
      const double* at_ = outputs_of(job, row[l]);
      for (long& i = last_output[l]; i >= 0 && job.forward * at_[i] > job.forward * time[l]; --i) {
        const S theta = S(std::min(std::max((at_[i] - time[l]) / (job.forward * size[l]), 0.0), 1.0));
        for (int j = 0; j < N; ++j) {
          S g = job.path_bar[(i * job.rows + row[l]) * N + j];
          sum[j][l] += g;
          for (int p = 0; p < POWERS; ++p) parts[p][j][l] += g *= theta;
        }
      }
    }
    for (int j = 0; j < N; ++j) {
      start[j] = load(sum[j]);
      for (int p = 0; p < POWERS; ++p) cbar[p][j] = load(parts[p][j]);
      for (int i = 0; i < K; ++i) kbar[i][j] = i == K - 1 ? k0bar[j] : V(0);
      @POLYNOMIAL_BACK@
    }
    @STAGES_BACK@
    for (int j = 0; j < N; ++j) {
      k0bar[j] = kbar[0][j];
      xbar[j] = xbar[j] + start[j];
    }
  }
  at_step(0);
  lanes<N>(first, x);
  alignas(64) S t0[W];
  for (int l = 0; l < W; ++l) t0[l] = S(start0[l]);
  pull(load(t0), x, shared, ownv, k0bar, xbar, sharedbar, ownbar);
  for (int j = 0; j < N; ++j) {
    xbar[j].store(bar[j]);
    for (int l = 0; l < W; ++l) {
      if (row[l] < 0) continue;
      S total = bar[j][l];
      for (long i = last_output[l]; i >= 0; --i) total += job.path_bar[(i * job.rows + row[l]) * N + j];
      job.x_bar[row[l] * N + j] = total;
    }
  }
  for (int i = 0; i < OWN; ++i) {
    alignas(64) S each[W];
    ownbar[i].store(each);
    S* const bars = job.inputs_bar[OWN_TABLE[i][0]];  // none for what has no gradient
    for (int l = 0; l < W && bars; ++l)
      if (row[l] >= 0) bars[OWN_TABLE[i][1] + OWN_TABLE[i][2] * row[l]] += each[l];
  }
}

static void go_back(const Job& job, const S* shared) {
  constexpr long BLOCK = 16 * W;
  Steps together;
  if (job.shared_step) solve_whole(job, shared, &together, false);
  const long blocks = (job.rows + BLOCK - 1) / BLOCK;
  double total[SHARED + 1] = {};
#pragma omp parallel for num_threads(job.threads) schedule(dynamic) if (job.threads > 1)
  for (long b = 0; b < blocks; ++b) {
    const long from = b * BLOCK, to = std::min(from + BLOCK, job.rows);
    std::vector<Steps> taken(job.shared_step ? 0 : to - from);
    if (!job.shared_step) solve_rows(job, shared, from, to, taken.data(), false);
    V sharedbar[SHARED + 1];
    for (int i = 0; i < SHARED; ++i) sharedbar[i] = V(0);
    for (long r = from; r < to; r += W) {
      long row[W];
      const Steps* lists[W];
      for (int l = 0; l < W; ++l) {
        row[l] = r + l < to ? r + l : -1;
        lists[l] = job.shared_step ? &together : row[l] < 0 ? nullptr : &taken[row[l] - from];
      }
      rows_back(job, shared, row, lists, sharedbar);
    }
#pragma omp critical
    for (int i = 0; i < SHARED; ++i) {
      alignas(64) S each[W];
      sharedbar[i].store(each);
      for (int l = 0; l < W; ++l) total[i] += each[l];
    }
  }
  for (int i = 0; i < SHARED; ++i)
    if (S* const bars = job.inputs_bar[SHARED_TABLE[i][0]]) bars[SHARED_TABLE[i][1]] += S(total[i]);
}
#endif

}  // namespace

// 0 where all rows came to their ends.
extern "C" int forward(const Job* job) {
  S shared[SHARED + 1];
  gather(shared, *job);
  if (job->shared_step) return solve_whole(*job, shared, nullptr, true) ? 0 : 1;
  const long parts = std::max(1L, std::min(job->threads, job->rows / (4 * W)));
  std::atomic<int> unsound{0};
#pragma omp parallel for num_threads(parts) if (parts > 1)
  for (long p = 0; p < parts; ++p)
    if (!solve_rows(*job, shared, job->rows * p / parts, job->rows * (p + 1) / parts, nullptr, true)) unsound = 1;
  return unsound;
}

extern "C" void backward(const Job* job) {
#if @WAY_BACK@
  S shared[SHARED + 1];
  gather(shared, *job);
  go_back(*job, shared);
#else
  (void)job;
#endif
}
