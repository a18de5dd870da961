// SPDX-License-Identifier: Apache-2.0
// Plans: sizes and order of states, defaults, the choice of the form, the text.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "fixture.h"

using fixture::description;
using fixture::make;
using fixture::query;

namespace {

std::string describe(const powerattn_plan *plan) {
  size_t needed = 0;
  REQUIRE(powerattn_plan_describe(plan, nullptr, 0, &needed) == POWERATTN_OK);
  std::string text(needed, '?');
  REQUIRE(powerattn_plan_describe(plan, text.data(), text.size(), nullptr) == POWERATTN_OK);
  REQUIRE(text.back() == '\0');
  text.pop_back();
  return text;
}

bool contains(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

// C(n, k) by Pascal's rule, in floating point wide enough for the sizes here.
long double choose(int n, int k) {
  std::vector<long double> row(static_cast<size_t>(k) + 1, 0);
  row[0] = 1;
  for (int i = 0; i < n; ++i) {
    for (int j = k; j > 0; --j) row[static_cast<size_t>(j)] += row[static_cast<size_t>(j) - 1];
  }
  return row[static_cast<size_t>(k)];
}

}  // namespace

TEST_CASE("state: rows are C(d + p - 1, p) for every legal shape") {
  for (int d = 1; d <= 256; ++d) {
    for (int p = 1; p <= 8; ++p) {
      int64_t rows = 0;
      REQUIRE(powerattn_state_rows(d, p, &rows) == POWERATTN_OK);
      CHECK(static_cast<long double>(rows) == choose(d + p - 1, p));
    }
  }
}

TEST_CASE("state: the literature's table") {
  // 12 layers x 12 heads of d = 64 with 2-byte elements: 39 MB, 14 GB, 2.2 TB.
  const struct {
    int degree;
    uint64_t bytes;
    double rounded;
  } table[] = {
      {2, UINT64_C(38937600), 39e6}, {4, UINT64_C(14348505600), 14e9}, {6, UINT64_C(2244106275840), 2.2e12}};
  for (const auto &t : table) {
    uint64_t bytes = 0;
    REQUIRE(powerattn_state_bytes(64, 64, t.degree, POWERATTN_BFLOAT16, 144, &bytes) == POWERATTN_OK);
    CHECK(bytes == t.bytes);
    CHECK(std::abs(static_cast<double>(bytes) / t.rounded - 1) < 0.03);
  }
}

TEST_CASE("state: sizes refuse what is outside") {
  int64_t rows = -5;
  uint64_t bytes = 5;
  const auto message = [] { return std::string(powerattn_last_error()); };
  CHECK(powerattn_state_rows(64, 2, nullptr) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(message() == "rows is NULL");
  CHECK(powerattn_state_rows(0, 2, &rows) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(message() == "head_dim is 0; allowed are 1 .. 256");
  CHECK(powerattn_state_rows(64, 9, &rows) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(message() == "degree is 9; allowed are 1 .. 8");
  CHECK(rows == -5);
  CHECK(powerattn_state_bytes(64, 64, 2, POWERATTN_FLOAT32, -1, &bytes) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(message() == "count is -1; it must be >= 0");
  CHECK(powerattn_state_bytes(64, 0, 2, POWERATTN_FLOAT32, 1, &bytes) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(message() == "value_dim is 0; allowed are 1 .. 256");
  CHECK(powerattn_state_bytes(64, 64, 2, 0, 1, &bytes) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(message() == "state_dtype is 0; allowed are FLOAT32, FLOAT16, BFLOAT16 and FLOAT64");
  CHECK(powerattn_state_bytes(256, 256, 8, POWERATTN_FLOAT32, 1000, &bytes) == POWERATTN_ERROR_UNSUPPORTED);
  CHECK(message() ==
        "1000 states of head_dim 256, value_dim 256 and degree 8 take more bytes than uint64_t holds");
  CHECK(bytes == 5);
  CHECK(powerattn_state_bytes(64, 64, 2, POWERATTN_FLOAT32, 0, &bytes) == POWERATTN_OK);
  CHECK(bytes == 0);
}

TEST_CASE("state: the canonical order is lexicographic and its weights make phi(a) . phi(b) = (a . b)^p") {
  for (const auto &[d, p] : {std::pair<int, int>{1, 8}, {2, 8}, {3, 1}, {5, 2}, {4, 3}, {6, 4}, {3, 6}}) {
    int64_t rows = 0;
    REQUIRE(powerattn_state_rows(d, p, &rows) == POWERATTN_OK);
    const size_t degree = static_cast<size_t>(p);
    std::vector<double> a, b;
    double dot = 0;
    for (int i = 0; i < d; ++i) {
      a.push_back(0.3 + 0.2 * i);
      b.push_back(0.9 - 0.25 * i);
      dot += a.back() * b.back();
    }
    std::vector<int32_t> previous;
    double sum = 0;
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<int32_t> index(degree, -1);
      double weight = 0;
      REQUIRE(powerattn_state_monomial(d, p, row, index.data(), &weight) == POWERATTN_OK);
      std::map<int32_t, int> times;
      double phi_a = weight, phi_b = weight, count = std::tgamma(p + 1.0);
      for (size_t m = 0; m < degree; ++m) {
        REQUIRE(index[m] >= 0);
        REQUIRE(index[m] < d);
        if (m > 0) CHECK(index[m - 1] <= index[m]);
        phi_a *= a[static_cast<size_t>(index[m])];
        phi_b *= b[static_cast<size_t>(index[m])];
        count /= ++times[index[m]];
      }
      CHECK(weight == doctest::Approx(std::sqrt(count)).epsilon(1e-15));
      if (row > 0) CHECK(previous < index);
      previous = index;
      sum += phi_a * phi_b;
    }
    CHECK(sum == doctest::Approx(std::pow(dot, p)).epsilon(1e-12));
  }
}

TEST_CASE("state: the last monomial of a large space") {
  int64_t rows = 0;
  REQUIRE(powerattn_state_rows(256, 8, &rows) == POWERATTN_OK);
  int32_t index[8];
  double weight = 0;
  REQUIRE(powerattn_state_monomial(256, 8, rows - 1, index, &weight) == POWERATTN_OK);
  for (const int32_t i : index) CHECK(i == 255);
  CHECK(weight == 1);
  REQUIRE(powerattn_state_monomial(256, 8, 1, index, &weight) == POWERATTN_OK);
  CHECK(index[6] == 0);
  CHECK(index[7] == 1);
  CHECK(weight == doctest::Approx(std::sqrt(8.0)));
  CHECK(powerattn_state_monomial(256, 8, rows, index, &weight) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(std::string(powerattn_last_error()) ==
        "row is " + std::to_string(rows) + "; allowed are 0 .. " + std::to_string(rows - 1));
  CHECK(powerattn_state_monomial(256, 8, -1, index, &weight) == POWERATTN_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("plan: defaults and sizes are resolved") {
  powerattn_desc d = description();
  d.value_dim = 0;
  powerattn_plan_info info = query(make(d).get());
  CHECK(info.scale == 1 / std::sqrt(8.0));
  CHECK(info.sequences == 2);
  CHECK(info.state_rows == 36);
  CHECK(info.state_bytes == 2 * 2 * 36 * 9 * 4);
  CHECK(info.predicted_forward_s > 0);
  CHECK(info.predicted_backward_s > 0);
  d.flags |= POWERATTN_CUSTOM_SCALE;
  CHECK(query(make(d).get()).scale == 0);
  d = fixture::packed_description();
  CHECK(query(make(d).get()).sequences == 3);
}

TEST_CASE("plan: query writes a newer caller's fields with zeros and refuses a wrong size") {
  const fixture::Plan plan = make(description());
  struct Newer {
    powerattn_plan_info info;
    unsigned char more[16];
  } newer;
  std::memset(&newer, 0xA5, sizeof(newer));
  newer.info.struct_size = sizeof(newer);
  REQUIRE(powerattn_plan_query(plan.get(), &newer.info) == POWERATTN_OK);
  CHECK(newer.info.struct_size == sizeof(newer));
  for (const unsigned char byte : newer.more) CHECK(byte == 0);

  powerattn_plan_info info = {};
  info.struct_size = 8;
  CHECK(powerattn_plan_query(plan.get(), &info) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(std::string(powerattn_last_error()) == "info->struct_size is 8; it must be 112 (sizeof the struct)");
  CHECK(info.state_rows == 0);
  CHECK(powerattn_plan_query(plan.get(), nullptr) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(powerattn_plan_query(nullptr, &info) == POWERATTN_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("plan: describe fits any capacity") {
  const fixture::Plan plan = make(description());
  const std::string whole = describe(plan.get());
  CHECK(whole.back() == '\n');
  char small[11];
  std::memset(small, 0x7F, sizeof(small));
  size_t needed = 0;
  REQUIRE(powerattn_plan_describe(plan.get(), small, 10, &needed) == POWERATTN_OK);
  CHECK(needed == whole.size() + 1);
  CHECK(std::string(small) == whole.substr(0, 9));
  CHECK(small[10] == 0x7F);
  CHECK(powerattn_plan_describe(plan.get(), nullptr, 1, nullptr) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(std::string(powerattn_last_error()) == "text is NULL");
  CHECK(powerattn_plan_describe(nullptr, small, 10, nullptr) == POWERATTN_ERROR_INVALID_ARGUMENT);
}

TEST_CASE("plan: describe says the problem, the form and why, what runs, and the state in human units") {
  powerattn_desc d = description();
  d.dtype = POWERATTN_BFLOAT16;
  d.state_dtype = POWERATTN_BFLOAT16;
  d.batch = d.heads_q = d.heads_kv = 12;
  d.head_dim = d.value_dim = 64;
  d.state_limit = UINT64_MAX;
  const char *const sizes[] = {"39 MB", "14 GB", "2.2 TB"};
  for (int i = 0; i < 3; ++i) {
    d.degree = 2 * (i + 1);
    const std::string text = describe(make(d).get());
    INFO(text);
    CHECK(contains(text, std::string(sizes[i]) + " for 12 sequences x 12 kv heads"));
    CHECK(contains(text, "bfloat16 degree " + std::to_string(d.degree)));
    CHECK(contains(text, "seq_len 5, heads 12/12, head_dim 64"));
    CHECK(contains(text, "step cpu."));
  }
}

TEST_CASE("plan: a state that does not fit forces the attention form, and says so") {
  powerattn_desc d = description();
  d.flags = 0;
  d.degree = 6;
  d.head_dim = d.value_dim = 64;
  d.batch = d.heads_q = d.heads_kv = 12;
  d.seq_len = 100000;
  d.state_limit = UINT64_C(64) << 30;
  {
    const fixture::Plan plan = make(d);
    const powerattn_plan_info info = query(plan.get());
    CHECK(info.form == POWERATTN_FORM_ATTENTION);
    CHECK(info.chunk_size == d.seq_len);
    CHECK(info.state_bytes == UINT64_C(4488212551680));
    const std::string text = describe(plan.get());
    INFO(text);
    CHECK(contains(text,
                   "form      attention, chunk 100000 (the states of the chunked form need 4.5 TB, the "
                   "limit is 69 GB)"));
    CHECK(contains(text, "no summary: the states need 4.5 TB, the limit is 69 GB"));
  }
  d.form = POWERATTN_FORM_CHUNKED;
  powerattn_plan *plan = nullptr;
  CHECK(powerattn_plan_create(&d, &plan) == POWERATTN_ERROR_STATE_TOO_LARGE);
  const std::string message = powerattn_last_error();
  CHECK(contains(message,
                 "form CHUNKED needs states of 4.5 TB (4488212551680 bytes: 12 sequences x 12 kv heads "
                 "x 119877472 rows x 65 x 4 bytes)"));
  d.form = POWERATTN_FORM_AUTO;
  d.flags = POWERATTN_USE_STATE;
  CHECK(powerattn_plan_create(&d, &plan) == POWERATTN_ERROR_STATE_TOO_LARGE);
  d.state_limit = 0;  // this machine's memory
  CHECK(powerattn_plan_create(&d, &plan) == POWERATTN_ERROR_STATE_TOO_LARGE);
  CHECK(contains(powerattn_last_error(), "the device's memory"));
  CHECK(plan == nullptr);
}

TEST_CASE("plan: a pinned form is kept") {
  powerattn_desc d = description();
  d.seq_len = 40;
  d.form = POWERATTN_FORM_ATTENTION;
  CHECK(query(make(d).get()).form == POWERATTN_FORM_ATTENTION);
  CHECK(contains(describe(make(d).get()), "pinned by the description"));
}

TEST_CASE("plan: a chunk size asks for chunks") {
  powerattn_desc d = description();
  d.seq_len = 40;
  d.chunk_size = 8;
  d.flags = POWERATTN_USE_STATE;
  {
    const fixture::Plan plan = make(d);
    CHECK(query(plan.get()).form == POWERATTN_FORM_CHUNKED);
    CHECK(query(plan.get()).chunk_size == 8);
    CHECK(contains(describe(plan.get()), "form      chunked, chunk 8 (chunk_size asks for chunks)"));
  }
  // The implementation of bfloat16 states has no chunks: it may run when they are asked for, not when pinned.
  d.state_dtype = POWERATTN_BFLOAT16;
  {
    const fixture::Plan plan = make(d);
    CHECK(query(plan.get()).form == POWERATTN_FORM_ATTENTION);
    CHECK(query(plan.get()).chunk_size == d.seq_len);
    const std::string text = describe(plan.get());
    INFO(text);
    CHECK(
        contains(text, "form      attention, chunk 40 (chunk_size asks for chunks, which nothing here runs)"));
    CHECK(contains(text, "no chunks: cpu."));
    CHECK(contains(text, "cpu.reference: the reference has the attention form only"));
    CHECK(contains(text, "runs      forward cpu.reference"));
  }
  d.form = POWERATTN_FORM_CHUNKED;
  {
    const std::string text = describe(make(d).get());
    INFO(text);
    CHECK(contains(text, "no forward: cpu."));
    CHECK(contains(text, "cpu.reference: the reference has the attention form only"));
  }
  // States that do not fit leave no chunks to ask for.
  d = description();
  d.flags = 0;
  d.seq_len = 40;
  d.chunk_size = 8;
  d.state_limit = 1;
  CHECK(query(make(d).get()).form == POWERATTN_FORM_ATTENTION);
  CHECK(contains(describe(make(d).get()), "the states of the chunked form need"));
}

// Both forms pinned and the free choice, from 256 to a million tokens per sequence, on every kind of device
// there is.
TEST_CASE("plan: the crossover to chunks follows the predicted times and is crossed once") {
  for (const int32_t device : {POWERATTN_CPU, POWERATTN_CUDA}) {
    int32_t devices = 0;
    REQUIRE(powerattn_device_count(device, &devices) == POWERATTN_OK);
    if (devices == 0) continue;
    for (const int32_t dtype : {POWERATTN_FLOAT32, POWERATTN_BFLOAT16}) {
      for (const int64_t dim : {64, 128}) {
        int attention = 0, chunked = 0;
        for (int64_t t = 256; t <= 1 << 20; t *= 2) {
          powerattn_desc d = {};
          d.struct_size = sizeof(d);
          d.device_type = device;
          d.dtype = dtype;
          d.degree = 2;
          d.batch = std::max<int64_t>(1, 65536 / t);
          d.seq_len = t;
          d.heads_q = d.heads_kv = 8;
          d.head_dim = dim;
          d.num_threads = 1;
          d.state_limit = UINT64_MAX;
          const fixture::Plan plan = make(d);
          const std::string text = describe(plan.get());
          INFO(text);
          const powerattn_plan_info free = query(plan.get());
          const bool chunks = free.form == POWERATTN_FORM_CHUNKED;
          d.form = chunks ? POWERATTN_FORM_ATTENTION : POWERATTN_FORM_CHUNKED;
          const powerattn_plan_info other = query(make(d).get());
          REQUIRE(other.form == d.form);
          const double time = free.predicted_forward_s + free.predicted_backward_s;
          const double other_time = other.predicted_forward_s + other.predicted_backward_s;
          // cuda.generic compares the forward calls alone.
          CHECK((contains(text, "runs      forward cuda.generic")
                     ? free.predicted_forward_s <= other.predicted_forward_s
                     : time <= other_time));
          char why[128];
          std::snprintf(why, sizeof(why),
                        "(the cost model's choice: %.3g ms forward and backward predicted, %.3g ms", time * 1e3,
                        other_time * 1e3);
          CHECK(contains(text, why));
          CHECK(contains(text, chunks ? "ms in the attention form)" : "ms in the chunked form with chunk "));
          ++(chunks ? chunked : attention);
          CHECK((chunks || chunked == 0));  // no way back
        }
        CHECK(attention > 0);
        CHECK(chunked > 0);
      }
    }
  }
}

TEST_CASE("plan: the number of threads") {
  powerattn_desc d = description();
  d.num_threads = 3;
  CHECK(contains(describe(make(d).get()), ", 3 threads"));
  d.num_threads = 0;
  setenv("POWERATTN_NUM_THREADS", "2", 1);
  CHECK(contains(describe(make(d).get()), ", 2 threads"));
  setenv("POWERATTN_NUM_THREADS", "many", 1);  // not a number: as if unset
  make(d);
  unsetenv("POWERATTN_NUM_THREADS");
}

TEST_CASE("library: devices, status strings, version") {
  int32_t count = -1;
  CHECK(powerattn_device_count(POWERATTN_CPU, &count) == POWERATTN_OK);
  CHECK(count == 1);
  CHECK(powerattn_device_count(POWERATTN_CUDA, &count) == POWERATTN_OK);
  CHECK(count >= 0);
  CHECK(powerattn_device_count(7, &count) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(std::string(powerattn_last_error()) == "device_type is 7; allowed are CPU (0) and CUDA (1)");
  CHECK(powerattn_device_count(POWERATTN_CPU, nullptr) == POWERATTN_ERROR_INVALID_ARGUMENT);
  CHECK(std::string(powerattn_last_error()) == "count is NULL");
  CHECK(powerattn_device_count(POWERATTN_CPU, &count) == POWERATTN_OK);
  CHECK(std::string(powerattn_last_error()) == "");

  std::map<std::string, int> texts;
  for (int s = POWERATTN_OK; s <= POWERATTN_ERROR_INTERNAL; ++s) ++texts[powerattn_status_string(s)];
  CHECK(texts.size() == POWERATTN_ERROR_INTERNAL + 1);
  CHECK(texts.count("unknown status") == 0);
  CHECK(std::string(powerattn_status_string(-1)) == "unknown status");
  CHECK(std::string(powerattn_status_string(10)) == "unknown status");
  CHECK(powerattn_version() ==
        POWERATTN_VERSION_MAJOR * 10000 + POWERATTN_VERSION_MINOR * 100 + POWERATTN_VERSION_PATCH);
}

TEST_CASE("library: a CUDA plan without a device is refused by name") {
  int32_t count = 0;
  REQUIRE(powerattn_device_count(POWERATTN_CUDA, &count) == POWERATTN_OK);
  powerattn_desc d = description();
  d.device_type = POWERATTN_CUDA;
  d.device_index = count;
  powerattn_plan *plan = nullptr;
  CHECK(powerattn_plan_create(&d, &plan) == POWERATTN_ERROR_NO_DEVICE);
  CHECK_FALSE(std::string(powerattn_last_error()).empty());
  CHECK(plan == nullptr);
}
