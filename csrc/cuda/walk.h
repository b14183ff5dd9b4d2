// The way from blocks to chunks, and from chunks to elements: arithmetic on sizes alone.
#pragma once

#include "parameter.h"

namespace pyreg::cuda {

// The last row whose first chunk is at most `chunk`: never an empty one but by chunks' end.
PYREG_DEVICE uint32_t find_row(const Parameter& p, uint32_t chunk) {
  uint32_t low = 0, high = p.rows;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (p.first_chunk(middle) <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The chunk at which a block begins: the first one of a segment.
PYREG_DEVICE uint32_t begin_of(const Parameter& p, uint32_t block) {
  const uint64_t chunk = static_cast<uint64_t>(block) * p.share;
  if (chunk >= p.chunks) return p.chunks;
  const uint32_t row = find_row(p, static_cast<uint32_t>(chunk));
  const uint32_t first = p.first_chunk(row), next = p.first_chunk(row + 1);
  const uint64_t segments = (chunk - first + p.run - 1) / p.run;
  const uint64_t begin = first + segments * p.run;
  return begin < next ? static_cast<uint32_t>(begin) : next;
}

// A chunk's place in its tensor.
struct Place {
  int64_t begin;  // elements
  int n;
  uint32_t segment, row;
};
PYREG_DEVICE Place place_of(const Parameter& p, const Entry& entry, uint32_t row, uint32_t next,
                            uint32_t chunk) {
  const uint32_t within = chunk - entry.first_chunk;
  return {within * kChunk, chunk + 1 == next ? entry.last + 1 : static_cast<int>(kChunk),
          entry.first_segment + within / p.run, row};
}

}  // namespace pyreg::cuda
