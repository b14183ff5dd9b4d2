// What a sweep walks: tensors cut into chunks and segments, and where they lie in memory.

#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "places.h"
#include "table.h"

namespace {

using namespace pyreg;

// Each element of a table is in one span, in order, and the two ways to find a span agree.
void check_cut(const std::vector<int64_t>& sizes) {
  std::vector<Row> rows;
  int64_t numel = 0;
  for (int64_t n : sizes) {
    rows.push_back({n, DType::kFloat32, 0});
    numel += n;
  }
  const Table table(rows, {0});
  CHECK(table.numel() == numel, "%lld != %lld", (long long)table.numel(), (long long)numel);
  const int64_t segments = table.segments();
  CHECK(segments <= kMostSegments + static_cast<int64_t>(sizes.size()), "%lld segments",
        (long long)segments);
  int64_t row = 0, at = 0;
  Span walked{0, 0, 0};
  for (int64_t s = 0; s < segments; ++s) {
    const Span span = table.locate(s);
    walked = s == 0 ? span : table.next(walked, s);
    CHECK(walked.row == span.row && walked.begin == span.begin && walked.end == span.end,
          "segment %lld", (long long)s);
    while (at == sizes[row]) {  // (empty rows too)
      ++row;
      at = 0;
    }
    CHECK(span.row == row && span.begin == at && span.end > at && span.end <= sizes[row],
          "segment %lld: row %lld [%lld, %lld), expected row %lld from %lld", (long long)s,
          (long long)span.row, (long long)span.begin, (long long)span.end, (long long)row,
          (long long)at);
    CHECK(span.begin % kChunk == 0 && (span.end % kChunk == 0 || span.end == sizes[row]),
          "segment %lld is not whole chunks", (long long)s);
    CHECK(s >= table.first_segment(row) && s < table.first_segment(row + 1), "segment %lld",
          (long long)s);
    at = span.end;
    if (failures > 20) return;
  }
  while (row < static_cast<int64_t>(sizes.size()) && at == sizes[row]) {
    ++row;
    at = 0;
  }
  CHECK(row == static_cast<int64_t>(sizes.size()), "rows from %lld on are not visited",
        (long long)row);
}

void test_table() {
  std::mt19937_64 random(1);
  const int64_t edges[] = {0, 1, kChunk - 1, kChunk, kChunk + 1, 2 * kChunk, 5 * kChunk - 1};
  for (int i = 0; i < 3000; ++i) {
    std::vector<int64_t> sizes(random() % 30);
    for (int64_t& n : sizes) {
      const uint64_t kind = random() % 4;
      n = kind == 0 ? 0 : kind == 1 ? edges[random() % 7] : static_cast<int64_t>(random() % 20000);
    }
    check_cut(sizes);
  }
  // Around one, two and many chunks a segment; one row and several; nothing is allocated.
  for (int64_t chunks : {kSegments - 1, kSegments, kSegments + 1, 2 * kSegments, 3 * kSegments + 1,
                         kSegmentChunks * kSegments + 1, kSegmentChunks * kMostSegments + 1})
    for (int64_t d : {-1, 0, 1}) {
      check_cut({chunks * kChunk + d});
      check_cut({0, chunks * kChunk / 2 + d, 0, 0, chunks * kChunk / 2, 5, 0});
    }
  check_cut({(int64_t{1} << 31) + 5000});
  check_cut({(int64_t{1} << 40) + 1, 3, 0, (int64_t{1} << 33) - 1});
  check_cut(std::vector<int64_t>(5000, kChunk + 1));
  check_cut({});
  check_cut({0});
  check_cut({0, 0, 0});
  for (const Row bad :
       {Row{-1, DType::kFloat32, 0}, Row{1, DType::kFloat32, 1}, Row{1, DType::kFloat32, -1}}) {
    bool thrown = false;
    try {
      Table({bad}, {0});
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    CHECK(thrown, "numel %lld rule %d", (long long)bad.numel, bad.rule);
  }
}

// Chunks in a segment: as many as leave 4,096 segments up to 16, then 16, then as many as leave
// 16,384.
void test_segments() {
  const std::pair<int64_t, int64_t> expected[] = {
      {1, 1},       {4096, 1},    {4097, 2},    {16 * 4096 - 4096, 15}, {16 * 4096, 16},
      {100000, 16}, {262144, 16}, {262145, 17}, {1960512, 120}};
  for (const auto& [chunks, run] : expected) {
    const Table table({{chunks * kChunk, DType::kFloat32, 0}}, {0});
    CHECK(table.run() == run * kChunk, "%lld chunks: %lld in a segment", (long long)chunks,
          (long long)(table.run() / kChunk));
  }
}

// Against every pair, for random intervals of which some touch, nest or coincide.
void test_overlapping() {
  std::mt19937 random(11);
  for (int round = 0; round < 2000; ++round) {
    const int rows = static_cast<int>(random() % 9);
    std::vector<char> memory(64);
    std::vector<int64_t> bytes(rows);
    std::vector<const char*> begin(rows);
    Places places(rows);
    for (int again = 0; again < 2; ++again) {  // the second time every row has moved
      for (int i = 0; i < rows; ++i) {
        bytes[i] = random() % 12;
        begin[i] = random() % 5 == 0 ? nullptr : memory.data() + random() % 52;
        places.note(i, begin[i]);
        CHECK(places.at(i, begin[i]), "row %d is not where it was noted", i);
      }
      std::vector<int64_t> expected;
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < rows; ++j)
          if (i != j && begin[i] && begin[j] && bytes[i] && bytes[j] &&
              begin[i] < begin[j] + bytes[j] && begin[j] < begin[i] + bytes[i]) {
            expected.push_back(i);
            break;
          }
      CHECK(places.overlapping(bytes) == expected, "round %d", round);
    }
  }
}

}  // namespace

int main() {
  test_table();
  test_segments();
  test_overlapping();
  if (failures) std::printf("%d checks failed\n", failures);
  return failures ? 1 : 0;
}
