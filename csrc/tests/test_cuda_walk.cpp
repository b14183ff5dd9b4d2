// The way from blocks to chunks to elements, and the packing of the parameter: by sizes alone.

#include "emulate.h"

namespace {

using namespace pyreg;
using cuda::Random;

// Blocks take neighbouring chunks from the first to the last, whole segments each; a chunk's place
// follows the one before; segments are numbered as in the CPU's table.
void check_walk(const std::vector<int64_t>& sizes, uint32_t most, bool in_table,
                bool totals = true) {
  std::vector<Row> rows;
  for (int64_t n : sizes) rows.push_back({n, DType::kFloat32, 0});
  const Table table(rows, {0});
  cuda::Plan plan(rows, {0}, true);
  const std::vector<cuda::Number> numbers(kMaxStrengths);
  plan.strengthen(numbers.data());
  std::vector<char> memory(plan.table_bytes());
  plan.write_table(memory.data());
  static cuda::Parameter p;
  const uint32_t blocks =
      plan.fill(p, in_table || !plan.by_value() ? memory.data() : nullptr, {}, most, totals);
  CHECK(blocks >= 1 && (blocks <= most || p.share <= std::max<int64_t>(p.run, cuda::kShare)),
        "%u blocks of %u, %u chunks each", blocks, most, p.share);
  CHECK(totals ? p.run * kChunk == table.run() : p.run <= cuda::kShare, "%u in a segment", p.run);
  CHECK(cuda::begin_of(p, 0) == 0 && cuda::begin_of(p, blocks) == p.chunks, "%u to %u of %u",
        cuda::begin_of(p, 0), cuda::begin_of(p, blocks), p.chunks);
  int64_t row = 0, at = 0, segment = -1;
  uint32_t before = 0;
  for (uint32_t block = 0; block < blocks && failures < 20; ++block) {
    const uint32_t begin = cuda::begin_of(p, block), end = cuda::begin_of(p, block + 1);
    CHECK(begin == before && end >= begin, "block %u: [%u, %u) after %u", block, begin, end,
          before);
    CHECK(end - begin < p.share + p.run, "block %u has %u chunks", block, end - begin);
    before = end;
    uint32_t found = cuda::find_row(p, begin);
    for (uint32_t chunk = begin; chunk < end && failures < 20; ++chunk) {
      uint32_t next = p.first_chunk(found + 1);
      while (chunk >= next) next = p.first_chunk(++found + 1);
      const cuda::Place place = cuda::place_of(p, p.entry(found), found, next, chunk);
      while (at == sizes[row]) ++row, at = 0;
      CHECK(found == row && place.begin == at && place.n >= 1 && place.n <= kChunk,
            "chunk %u: row %u, %d from %lld; expected row %lld, %lld", chunk, found, place.n,
            (long long)place.begin, (long long)row, (long long)at);
      if (!totals) {  // (segments have no numbers then)
        at += place.n;
        continue;
      }
      if (place.segment != segment) CHECK(at % table.run() == 0, "segment %u", place.segment);
      if (chunk == begin) CHECK(place.segment != segment, "block %u begins in a segment", block);
      CHECK(place.segment == segment || place.segment == segment + 1, "segment %u after %lld",
            place.segment, (long long)segment);
      segment = place.segment;
      const Span span = table.locate(segment);
      CHECK(span.row == row && span.begin <= at && at + place.n <= span.end, "segment %lld",
            (long long)segment);
      at += place.n;
    }
  }
  while (row < static_cast<int64_t>(sizes.size()) && at == sizes[row]) ++row, at = 0;
  CHECK(row == static_cast<int64_t>(sizes.size()), "rows from %lld on are not visited",
        (long long)row);
  if (totals) CHECK(segment + 1 == table.segments(), "%lld segments", (long long)segment + 1);
}

void test_walk() {
  Random random(3);
  const int64_t edges[] = {0, 1, kChunk - 1, kChunk, kChunk + 1, 2 * kChunk, 70 * kChunk - 1};
  for (int i = 0; i < 3000; ++i) {
    std::vector<int64_t> sizes(random() % 40);
    for (int64_t& n : sizes)
      n = random() % 2 ? edges[random() % 7] : static_cast<int64_t>(random() % 90000);
    check_walk(sizes, 1 + random() % 30, random() % 2);
  }
  for (int64_t chunks : {kSegments - 1, kSegments, kSegments + 1, 2 * kSegments, 3 * kSegments + 1,
                         kSegmentChunks * kMostSegments + 1})
    for (int64_t d : {-1, 0, 1})
      for (uint32_t blocks : {1u, 320u, 792u})
        for (bool totals : {true, false}) {
          check_walk({chunks * kChunk + d}, blocks, false, totals);
          check_walk({0, chunks * kChunk / 2 + d, 0, 0, chunks * kChunk / 2, 5, 0}, blocks, false,
                     totals);
        }
  check_walk({(int64_t{1} << 31) + 5000}, 792, false);
  check_walk({5, (int64_t{1} << 32) + 1, 3, 0, (int64_t{1} << 31) - 1}, 792, true);
  check_walk(std::vector<int64_t>(20000, kChunk + 1), 792, true);
  for (int d : {-2, -1, 0, 1})  // around what the parameter holds
    check_walk(std::vector<int64_t>(cuda::kEntries + d, 3), 264, false);
}

// A tensor comes out of 24 bytes as it went in, at the ends of every field.
void test_packing() {
  using cuda::PackedEntry;
  int token = 0;
  for (uint32_t chunk : {0u, 1u, (1u << PackedEntry::kChunkBits) - 1})
    for (uint32_t segment : {0u, 1u, (1u << PackedEntry::kSegmentBits) - 1})
      for (uint32_t rule : {0u, 1u, (1u << PackedEntry::kRuleBits) - 1})
        for (uint32_t last : {0u, static_cast<uint32_t>(kChunk) - 1})
          for (uint8_t dtype = 0; dtype < kDTypes; ++dtype) {
            const cuda::Entry e{&token, nullptr, chunk, segment, rule, static_cast<uint16_t>(last),
                                dtype};
            CHECK(PackedEntry::fits(e), "chunk %u", chunk);
            const PackedEntry packed = PackedEntry::pack(e);
            const cuda::Entry back = packed.unpack();
            CHECK(back.w == e.w && back.g == e.g && back.first_chunk == chunk &&
                      packed.first_chunk() == chunk && back.first_segment == segment &&
                      back.rule == rule && back.last == last && back.dtype == dtype,
                  "chunk %u, segment %u, rule %u, last %u, dtype %d", chunk, segment, rule, last,
                  dtype);
          }
}

// What is passed by value: as many tensors as a Llama of 405e9 elements has, and no more than fit.
void test_capacity() {
  const auto by_value = [](size_t tensors, int64_t numel, int rules) {
    const std::vector<Row> rows(tensors, {numel, DType::kBFloat16, 0});
    return cuda::Plan(rows, std::vector<int>(rules, 0), true).by_value();
  };
  static_assert(cuda::kEntries - 1 >= 1300 && sizeof(cuda::Parameter) <= 32764);
  static_assert(cuda::kEntriesInMetric * sizeof(cuda::PackedEntry) +
                    (cuda::kEntriesInMetric - 1) * sizeof(cuda::RowMetric) <=
                cuda::kEntries * sizeof(cuda::PackedEntry));
  CHECK(by_value(1137, int64_t{405} * 1000000000 / 1137, 1), "a Llama of 405e9 elements");
  CHECK(by_value(cuda::kEntries - 1, 5000, cuda::kRules), "as many as fit");
  CHECK(!by_value(cuda::kEntries, 5000, 1), "one tensor too many");
  CHECK(!by_value(3, 5000, cuda::kRules + 1), "one rule too many");
  CHECK(!by_value(2, int64_t{1} << (cuda::PackedEntry::kChunkBits + 12), 1),
        "too many chunks for the bits");
  CHECK(by_value(0, 0, 1), "nothing");
  bool thrown = false;
  try {
    by_value(3, int64_t{1} << 43, 1);
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  CHECK(thrown, "more chunks than are numbered");
}

}  // namespace

int main() {
  test_walk();
  test_packing();
  test_capacity();
  if (failures) std::printf("%d checks failed\n", failures);
  return failures ? 1 : 0;
}
