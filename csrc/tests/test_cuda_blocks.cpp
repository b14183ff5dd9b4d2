// The code of the CUDA kernels, run on the host: loops stand for blocks, warps and threads.
//
// Shows, without a GPU, that every element is visited once whatever the sizes, alignments and grid,
// that the parameter holds what it should, and that all results are the CPU sweeps' to the bit.

#include "emulate.h"
#include "sweeps.h"

namespace {

using namespace pyreg;
using cuda::Sweep;

using cuda::Random;

constexpr DType kAllDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kBFloat16,
                                DType::kFloat16};

// Rows in one block of memory each, at an offset of `skip` elements, with a guard behind.
struct Rows {
  std::vector<Row> rows;
  std::vector<int> skip;
  std::vector<std::vector<unsigned char>> memory;

  Rows(std::vector<Row> rows, std::vector<int> skip)
      : rows(std::move(rows)), skip(std::move(skip)) {
    for (size_t i = 0; i < this->rows.size(); ++i)
      memory.emplace_back(
          (this->rows[i].numel + this->skip[i] + 8) * item_size(this->rows[i].dtype), 0x5a);
  }
  // vector's memory is at 16 bytes.
  char* at(size_t i) {
    return reinterpret_cast<char*>(memory[i].data()) + skip[i] * item_size(rows[i].dtype);
  }
  std::vector<void*> pointers() {
    std::vector<void*> all;
    for (size_t i = 0; i < rows.size(); ++i) all.push_back(at(i));
    return all;
  }
  void make_positive() {
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t size = item_size(rows[i].dtype);
      for (int64_t e = 0; e < rows[i].numel; ++e) at(i)[e * size + size - 1] &= 0x7f;
    }
  }
  // Normal numbers, some of both zeros; with `rare` a NaN or an infinity here and there.
  void fill(Random& random, bool rare) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < rows.size(); ++i)
      for (int64_t e = 0; e < rows[i].numel; ++e) {
        float x = e % 7 == 3 ? 0.0f : e % 11 == 5 ? -0.0f : normal(random);
        if (rare && random() % 5000 == 0) x = random() % 2 ? -INFINITY : NAN;
        char* to = at(i) + e * item_size(rows[i].dtype);
        const double wide = x;
        const BFloat16 b = to_bfloat16(x);
        const Float16 h = to_float16(x);
        switch (rows[i].dtype) {
          case DType::kFloat32:
            std::memcpy(to, &x, 4);
            break;
          case DType::kFloat64:
            std::memcpy(to, &wide, 8);
            break;
          case DType::kBFloat16:
            std::memcpy(to, &b, 2);
            break;
          case DType::kFloat16:
            std::memcpy(to, &h, 2);
            break;
        }
      }
  }
};

#define PYREG_MOMENT(U) U::kMoment,
constexpr int kMoments[] = {PYREG_UPDATES(PYREG_MOMENT)};
#undef PYREG_MOMENT

std::vector<Row> random_rows(Random& random, int most, int rules) {
  const int64_t edges[] = {0,
                           1,
                           7,
                           8,
                           9,
                           255,
                           256,
                           257,
                           kChunk - 1,
                           kChunk,
                           kChunk + 1,
                           2 * kChunk,
                           5 * kChunk - 1,
                           3 * kChunk + 8};
  std::vector<Row> rows(random() % most);
  for (Row& row : rows) {
    const uint64_t kind = random() % 4;
    row.numel = kind == 0 ? static_cast<int64_t>(random() % 20000)
                          : edges[random() % (sizeof edges / sizeof *edges)];
    row.dtype = kAllDTypes[random() % kDTypes];
    row.rule = static_cast<int>(random() % rules);
  }
  return rows;
}

// Every sweep but the optimizers' step over random tensors, by the kernels' code and by the CPU's:
// the same bits. Both with the tensors in the parameter and in a table, for several grids.
void test_same_bits_as_the_cpu() {
  Random random(1);
  uint32_t done = 0;
  auto p = std::make_unique<cuda::Parameter>();
  for (int round = 0; round < 250; ++round) {
    const int rules = 1 + static_cast<int>(random() % 4);
    std::vector<int> penalties(rules), skip;
    const int known = round % 2 ? kElementary : kPenalties;
    for (int& penalty : penalties) penalty = static_cast<int>(random() % known);
    const auto rows = random_rows(random, round % 10 == 0 ? 60 : 12, rules);
    for (size_t i = 0; i < rows.size(); ++i)
      skip.push_back(random() % 2 ? 0 : static_cast<int>(random() % 8));
    Rows w(rows, skip);
    w.fill(random, round % 3 == 0);
    std::reverse(skip.begin(), skip.end());  // gradients are aligned otherwise
    Rows g(rows, skip);
    g.fill(random, false);
    auto gradients = g.pointers();
    for (void*& gradient : gradients)
      if (random() % 8 == 0) gradient = nullptr;

    std::vector<double> strengths(rules * kMaxStrengths);
    for (double& s : strengths) s = static_cast<double>(random() % 1000) * 1.1e-3;
    for (int r = 0; r < rules; ++r)
      if (penalties[r] >= kElementary) strengths[r * kMaxStrengths + 1] += 2.1;  // a shape
    double scale = random() % 2 ? 1.0 : -0.3;
    float narrow_scale = static_cast<float>(scale);
    std::vector<cuda::Number> numbers;
    for (const double& s : strengths)
      numbers.push_back(random() % 2 ? cuda::Number::of(s)
                                     : cuda::Number::at(&s, cuda::ScalarKind::kFloat64));

    std::vector<Row> beside = rows;  // moments, and each row's metric
    for (Row& row : beside)
      if (random() % 2) row.dtype = DType::kFloat32;
    Rows moments(beside, skip);
    moments.fill(random, false);
    moments.make_positive();
    auto moment_pointers = moments.pointers();
    std::vector<Metric> metrics(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      if (random() % 4 == 0) moment_pointers[i] = nullptr;
      const auto number = [&] { return static_cast<double>(random() % 1000) * 1.1e-3; };
      const bool float32 = moment_pointers[i] && beside[i].dtype == DType::kFloat32;
      metrics[i] = {moment_pointers[i], float32, random() % 2 == 0, number(), number(), number()};
    }
    std::vector<cuda::RowMetric> row_metrics(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const double* given[] = {&metrics[i].numerator, &metrics[i].factor, &metrics[i].offset};
      for (int k = 0; k < 3; ++k) {
        const auto number = random() % 2 ? cuda::Number::of(*given[k])
                                         : cuda::Number::at(given[k], cuda::ScalarKind::kFloat64);
        row_metrics[i].numbers[k] = number.scalar;
        row_metrics[i].kinds[k] = number.kind;
      }
      row_metrics[i].root = metrics[i].root;
      row_metrics[i].float32 = metrics[i].float32;
    }
    const size_t left_out = random() % 9;  // a row that the caller sees to, if there is one

    const Table table(rows, penalties);
    for (int s = 0; s < static_cast<int>(Sweep::kStep); ++s) {
      const Sweep sweep = static_cast<Sweep>(s);
      const bool stats = sweep == Sweep::kStats, in_metric = sweep == Sweep::kProxInMetric,
                 totals = cuda::has_totals(sweep);
      const auto written = [&](Rows& of) {
        auto all = of.pointers();
        if ((in_metric || sweep == Sweep::kProx) && left_out < all.size()) all[left_out] = nullptr;
        return all;
      };
      const int columns = stats ? 5 : kMaxSums;
      const double given = sweep == Sweep::kProx ? std::fabs(scale) : scale;
      cuda::Number number = cuda::Number::of(given);
      if (sweep == Sweep::kGradient)
        number = cuda::Number::at(&narrow_scale, cuda::ScalarKind::kFloat32);
      const double used = sweep == Sweep::kGradient ? narrow_scale : given;

      Rows cpu_w = w, cpu_g = g;
      auto cpu_gradients = cpu_g.pointers();
      for (size_t i = 0; i < rows.size(); ++i)
        if (gradients[i] == nullptr) cpu_gradients[i] = nullptr;
      std::vector<double> expected;
      if (totals && !stats) {
        std::vector<double> sums(rules * kMaxSums);
        if (sweep == Sweep::kValue)
          cpu::value(table, cpu_w.pointers().data(), strengths.data(), sums.data(), 1);
        else if (in_metric)
          cpu::prox_in_metric(table, written(cpu_w).data(), metrics.data(), strengths.data(),
                              sums.data(), 1);
        else
          cpu::accumulate(table, cpu_w.pointers().data(), cpu_gradients.data(), strengths.data(),
                          used, sums.data(), 1);
        expected.push_back(value_from_sums(table, sums.data(), strengths.data()));
        expected.insert(expected.end(), sums.begin(), sums.end());
        const std::vector<double> values = values_from_sums(table, sums.data(), strengths.data());
        expected.insert(expected.end(), values.begin(), values.end());
      } else if (sweep == Sweep::kGradient) {
        cpu::gradient(table, cpu_w.pointers().data(), cpu_gradients.data(), strengths.data(), used,
                      1);
      } else if (sweep == Sweep::kProx) {
        cpu::prox(table, written(cpu_w).data(), strengths.data(), used, 1);
      } else {
        std::vector<Stats> all(rows.size());
        cpu::stats(table, cpu_w.pointers().data(), all.data(), 1);
        for (const Stats& one : all)
          for (double x : {one.l1, one.l2_squared, one.max_abs, static_cast<double>(one.zeros),
                           static_cast<double>(one.non_finite)})
            expected.push_back(x);
      }

      cuda::Plan plan(rows, penalties, !stats);
      CHECK(plan.by_value(), "%zu rows", rows.size());
      for (uint32_t most : {1u, 3u, 1000u}) {
        Rows gpu_w = w, gpu_g = g;
        auto gpu_gradients = gpu_g.pointers();
        for (size_t i = 0; i < rows.size(); ++i)
          if (gradients[i] == nullptr) gpu_gradients[i] = nullptr;
        const bool with_g = sweep == Sweep::kGradient || sweep == Sweep::kAccumulate;
        plan.show(written(gpu_w).data(),
                  in_metric ? moment_pointers.data()
                  : with_g  ? gpu_gradients.data()
                            : nullptr,
                  in_metric ? row_metrics.data() : nullptr);
        plan.strengthen(numbers.data());
        std::vector<char> memory(plan.table_bytes() + 16);
        plan.write_table(memory.data());
        std::memset(static_cast<void*>(p.get()), 0xff, sizeof *p);
        const uint32_t blocks =
            plan.fill(*p, most == 3 ? memory.data() : nullptr, number, most, totals);
        std::vector<double> out(totals ? stats ? rows.size() * 5 : 2 + rules * (kMaxSums + 1) : 0,
                                NAN);
        std::vector<double> partials(plan.segments() * columns + 1, NAN);
        p->out = out.data();
        p->partials = partials.data();
        p->done = &done;
        cuda::run_sweep(sweep, plan.family(), *p, blocks, random);
        CHECK(done == 0, "the counter is %u after sweep %d", done, s);
        for (size_t i = 0; i < expected.size(); ++i)
          CHECK((std::isnan(out[i]) && std::isnan(expected[i])) || out[i] == expected[i],
                "round %d, sweep %d, %u blocks: result %zu is %.17g, the CPU's %.17g", round, s,
                blocks, i, out[i], expected[i]);
        if (totals && !stats) {
          float rounded;
          std::memcpy(&rounded, &out[expected.size()], sizeof rounded);
          CHECK(rounded == static_cast<float>(out[0]) || std::isnan(out[0]), "value as float32: %g",
                rounded);
        }
        CHECK(gpu_w.memory == cpu_w.memory && gpu_g.memory == cpu_g.memory,
              "round %d, sweep %d, %u blocks: other bits than the CPU's", round, s, blocks);
        if (failures) return;
      }
    }
  }
}

// An optimizer's step likewise, each row with an update of its own.
void test_steps_as_the_cpu() {
  Random random(3);
  uint32_t done = 0;
  auto p = std::make_unique<cuda::Parameter>();
  for (int round = 0; round < 200; ++round) {
    const int rules = 1 + static_cast<int>(random() % 3);
    std::vector<int> penalties(rules), skip;
    for (int& penalty : penalties) penalty = static_cast<int>(random() % kElementary);
    const auto rows = random_rows(random, 12, rules);
    for (size_t i = 0; i < rows.size(); ++i)
      skip.push_back(random() % 2 ? 0 : static_cast<int>(random() % 8));
    std::vector<Row> beside = rows, masters = rows;
    for (Row& row : beside)
      if (random() % 2) row.dtype = DType::kFloat32;
    for (Row& row : masters) row.dtype = DType::kFloat32;
    Rows w(rows, skip), g(rows, skip), master(masters, skip);
    w.fill(random, false), g.fill(random, false), master.fill(random, false);
    std::vector<Rows> states;
    for (int k = 0; k < kMaxStates; ++k) {
      states.emplace_back(beside, skip);
      states.back().fill(random, false);
      states.back().make_positive();
    }
    std::vector<double> strengths(rules * kMaxStrengths), numbers;
    std::vector<cuda::Number> given;
    for (double& s : strengths) s = static_cast<double>(random() % 1000) * 1.1e-3;
    for (const double& s : strengths) given.push_back(cuda::Number::of(s));
    const int sets = 1 + static_cast<int>(random() % 3);
    for (int set = 0; set < sets; ++set)
      for (double x :
           {set ? -1.0 : 1.0, 0.999, set * 0.1, 0.1, 0.9, 0.1, 0.01, 1.5, 1e-3, 0.05, 1.0, 0.0})
        numbers.push_back(x);
    std::vector<Update> updates(rows.size());
    std::vector<cuda::RowStep> steps(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      Update& u = updates[i];
      do u.update = static_cast<int>(random() % kUpdates);
      while (kMoments[u.update] == kOfSeveral);  // the root of a negative number
      u.float32 = beside[i].dtype == DType::kFloat32 && rows[i].dtype != DType::kFloat32;
      u.penalised = random() % 4 != 0;
      const bool narrow = item_size(rows[i].dtype) == 2 && u.float32;
      if (narrow && random() % 2) {
        u.at_random = rows[i].dtype == DType::kBFloat16;
        u.key = static_cast<uint32_t>(random());
      }
      steps[i] = {{},
                  nullptr,
                  u.key,
                  static_cast<uint32_t>(random() % sets),
                  static_cast<uint8_t>(u.update),
                  u.float32,
                  u.penalised,
                  u.at_random};
      u.numbers = numbers.data() + steps[i].set * cuda::kSetNumbers;
      u.metric.numerator = u.numbers[kNumbers];
    }
    std::vector<bool> mastered(rows.size());
    for (size_t i = 0; i < rows.size(); ++i)
      mastered[i] = item_size(rows[i].dtype) == 2 && updates[i].float32 && !updates[i].at_random &&
                    random() % 2;
    const double scale = random() % 2 ? 1.0 : -0.3;
    const Table table(rows, penalties);
    for (bool prox : {false, true}) {
      Rows cpu_w = w, cpu_master = master;
      auto cpu_states = states;
      for (size_t i = 0; i < rows.size(); ++i) {
        for (int k = 0; k < kMaxStates; ++k) updates[i].states[k] = cpu_states[k].pointers()[i];
        updates[i].master = mastered[i] ? cpu_master.pointers()[i] : nullptr;
      }
      std::vector<double> sums(rules * kMaxSums);
      const int64_t zeros =
          cpu::step(table, cpu_w.pointers().data(), g.pointers().data(), updates.data(), prox,
                    strengths.data(), scale, sums.data(), 1);
      const double value = value_from_sums(table, sums.data(), strengths.data());
      cuda::Plan plan(rows, penalties, true);
      for (uint32_t most : {1u, 3u, 1000u}) {
        Rows gpu_w = w, gpu_master = master;
        auto gpu_states = states;
        for (size_t i = 0; i < rows.size(); ++i) {
          for (int k = 0; k < kMaxStates; ++k) steps[i].states[k] = gpu_states[k].pointers()[i];
          steps[i].master = mastered[i] ? gpu_master.pointers()[i] : nullptr;
        }
        const cuda::Number one = cuda::Number::of(1), none = cuda::Number::of(0);
        cuda::StepFacts facts{nullptr, one.scalar, none.scalar, one.kind, none.kind, prox};
        const bool elsewhere = round % 2;
        if (elsewhere) facts.numbers = numbers.data();
        plan.show(gpu_w.pointers().data(), g.pointers().data());
        plan.step(facts, steps.data(), elsewhere ? std::vector<double>() : numbers);
        plan.strengthen(given.data());
        std::vector<char> memory(plan.table_bytes() + 16);
        plan.write_table(memory.data());
        std::memset(static_cast<void*>(p.get()), 0xff, sizeof *p);
        const uint32_t blocks =
            plan.fill(*p, most == 3 ? memory.data() : nullptr, cuda::Number::of(scale), most);
        constexpr int kColumns = cuda::kColumns<Sweep::kStep>;
        std::vector<double> out(3 + rules * (kColumns + 1), NAN);
        std::vector<double> partials(plan.segments() * kColumns + 1, NAN);
        p->out = out.data(), p->partials = partials.data(), p->done = &done;
        cuda::run_sweep(Sweep::kStep, plan.family(), *p, blocks, random);
        int64_t found;
        std::memcpy(&found, &out.back(), sizeof found);
        CHECK(out[0] == value && found == zeros,
              "round %d, %u blocks: value %.17g, zeros %lld, the CPU's %.17g, %lld", round, blocks,
              out[0], static_cast<long long>(found), value, static_cast<long long>(zeros));
        bool same = gpu_w.memory == cpu_w.memory && gpu_master.memory == cpu_master.memory;
        for (int k = 0; k < kMaxStates; ++k)
          same = same && gpu_states[k].memory == cpu_states[k].memory;
        CHECK(same, "round %d, %u blocks: other bits than the CPU's", round, blocks);
        if (failures) return;
      }
    }
  }
}

// Segments of several chunks: one that goes on in the next batch, and shares that end inside rows.
void test_long_segments() {
  Random random(2);
  uint32_t done = 0;
  auto p = std::make_unique<cuda::Parameter>();
  const Rows w = [&] {
    std::vector<Row> all(150, {3, DType::kFloat32, 1});  // more rows than a block has threads
    all.insert(all.end(), {{(2 * kSegments + 700) * kChunk + 17, DType::kBFloat16, 0},
                           {0, DType::kFloat32, 0},
                           {99 * kChunk, DType::kFloat32, 1},
                           {kChunk + 1, DType::kFloat64, 0}});
    std::vector<int> skip(all.size());
    skip[152] = 1;
    Rows rows(all, skip);
    rows.fill(random, false);
    return rows;
  }();
  Rows copy = w;
  const std::vector<int> penalties = {2, 0};  // elastic net, L1
  const std::vector<double> strengths = {0.3, 0.1, 0.2, 0};
  std::vector<cuda::Number> numbers;
  for (double s : strengths) numbers.push_back(cuda::Number::of(s));
  const Table table(copy.rows, penalties);
  std::vector<double> expected(2 * kMaxSums);
  cpu::value(table, copy.pointers().data(), strengths.data(), expected.data(), 1);
  std::vector<Stats> stats(copy.rows.size());
  cpu::stats(table, copy.pointers().data(), stats.data(), 1);
  for (uint32_t most : {7u, 792u}) {
    cuda::Plan plan(copy.rows, penalties, true), by_row(copy.rows, penalties, false);
    plan.show(copy.pointers().data(), nullptr);
    plan.strengthen(numbers.data());
    by_row.show(copy.pointers().data(), nullptr);
    std::vector<double> partials(plan.segments() * 5), out(2 + expected.size() + penalties.size());
    // Longer shares than those of a grid in the order of memory, as very long segments make.
    const auto share_out = [&](uint32_t blocks) {
      if (blocks <= most) return blocks;
      const uint32_t segments = (p->chunks + p->run - 1) / p->run;
      p->share = (segments + most - 1) / most * p->run;
      return (p->chunks + p->share - 1) / p->share;
    };
    uint32_t blocks = share_out(plan.fill(*p, nullptr, cuda::Number::of(1), most));
    CHECK(p->run > 1 && (most > 7 || p->share > 2 * cuda::kBatch), "%u chunks each", p->share);
    p->out = out.data(), p->partials = partials.data(), p->done = &done;
    cuda::run_sweep(Sweep::kValue, plan.family(), *p, blocks, random);
    for (size_t i = 0; i < expected.size(); ++i)
      CHECK(out[1 + i] == expected[i], "%u blocks: sum %zu is %.17g, the CPU's %.17g", blocks, i,
            out[1 + i], expected[i]);
    CHECK(out[0] == value_from_sums(table, expected.data(), strengths.data()), "%.17g", out[0]);
    out.resize(5 * stats.size());
    blocks = share_out(by_row.fill(*p, nullptr, cuda::Number::of(1), most));
    p->out = out.data();
    cuda::run_sweep(Sweep::kStats, by_row.family(), *p, blocks, random);
    for (size_t r = 0; r < stats.size(); ++r)
      CHECK(out[5 * r] == stats[r].l1 && out[5 * r + 1] == stats[r].l2_squared &&
                out[5 * r + 2] == stats[r].max_abs && out[5 * r + 3] == stats[r].zeros &&
                out[5 * r + 4] == stats[r].non_finite,
            "%u blocks: row %zu: l1 %.17g, the CPU's %.17g", blocks, r, out[5 * r], stats[r].l1);
  }
}

}  // namespace

int main() {
  test_same_bits_as_the_cpu();
  test_steps_as_the_cpu();
  test_long_segments();
  if (failures) std::printf("%d checks failed\n", failures);
  return failures ? 1 : 0;
}
