// SPDX-License-Identifier: Apache-2.0
#include "freewheel/files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

#include "json_value.h"
#include "try.h"

#ifdef FREEWHEEL_ZLIB
#include <zlib.h>
#endif

namespace freewheel {
namespace {

constexpr std::size_t kMaxHeaderBytes = std::size_t{100} << 20;
constexpr std::size_t kHeaderAlignment = 64;

struct Spelling {
  const char* theirs;
  DType ours;
};

constexpr Spelling kSafetensorsDTypes[] = {
    {"F32", DType::kFloat32},   {"F64", DType::kFloat64}, {"F16", DType::kFloat16},
    {"BF16", DType::kBfloat16}, {"I64", DType::kInt64},   {"I32", DType::kInt32},
    {"BOOL", DType::kBool},     {"U8", DType::kUint8},
};

constexpr Spelling kNpyDTypes[] = {
    {"<f4", DType::kFloat32}, {"<f8", DType::kFloat64}, {"<f2", DType::kFloat16},
    {"<i8", DType::kInt64},   {"<i4", DType::kInt32},   {"|b1", DType::kBool},
    {"|u1", DType::kUint8},
};

template <std::size_t N>
const DType* dtype_of(const Spelling (&table)[N], const std::string& spelled) {
  for (const Spelling& row : table) {
    if (spelled == row.theirs) return &row.ours;
  }
  return nullptr;
}

template <std::size_t N>
const char* spelling_of(const Spelling (&table)[N], DType dtype) {
  for (const Spelling& row : table) {
    if (row.ours == dtype) return row.theirs;
  }
  return nullptr;
}

Status system_fault(Code code, const std::string& path, const char* verb, const char* hint) {
  return Status(code, path, std::string("can't be ") + verb + ": " + std::strerror(errno), hint);
}

/// A C file that closes itself.
struct Stream {
  explicit Stream(std::FILE* opened) : file(opened) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    if (file != nullptr) std::fclose(file);
  }
  std::FILE* file;
};

struct Piece {
  const void* data;
  std::size_t bytes;
};

Status write_pieces(const std::string& path, const std::vector<Piece>& pieces) {
  const char* hint = "free some space or choose another file";
  Stream out(std::fopen(path.c_str(), "wb"));
  if (out.file == nullptr) return system_fault(Code::kOutput, path, "written", hint);
  for (const Piece& piece : pieces) {
    if (piece.bytes != 0 && std::fwrite(piece.data, 1, piece.bytes, out.file) != piece.bytes) {
      return system_fault(Code::kOutput, path, "written", hint);
    }
  }
  std::FILE* closing = out.file;
  out.file = nullptr;
  if (std::fclose(closing) != 0) return system_fault(Code::kOutput, path, "written", hint);
  return {};
}

/// Reads one header entry; an empty text is success.
std::string read_entry(const nlohmann::json& entry, std::size_t start, const MappedFile& file,
                       Tensor& tensor) {
  if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() ||
      !entry.contains("shape") || !entry["shape"].is_array() || !entry.contains("data_offsets") ||
      !entry["data_offsets"].is_array() || entry["data_offsets"].size() != 2 ||
      entry["shape"].size() > static_cast<std::size_t>(Shape::kMaxRank)) {
    return "has an unusable header entry";
  }
  const DType* dtype = dtype_of(kSafetensorsDTypes, entry["dtype"].get<std::string>());
  if (dtype == nullptr) return "has dtype " + entry["dtype"].dump() + ", which is not read";
  tensor.dtype = *dtype;
  const std::size_t limit = file.size();
  std::size_t bytes = item_bytes(*dtype);
  for (const auto& size : entry["shape"]) {
    if (!size.is_number_unsigned()) return "has an unusable shape";
    const auto read = size.get<std::uint64_t>();
    if (read != 0 && bytes > limit / read) return "has a size that its file denies";
    bytes *= read;
    tensor.shape.push_back(static_cast<std::int64_t>(read));
  }
  const auto& range = entry["data_offsets"];
  if (!range[0].is_number_unsigned() || !range[1].is_number_unsigned()) {
    return "has unusable offsets";
  }
  const auto begin = range[0].get<std::uint64_t>(), end = range[1].get<std::uint64_t>();
  if (begin > end || end > limit - start || end - begin != bytes) {
    return "has a size that its shape denies";
  }
  tensor.data = file.data() + start + begin;
  return {};
}

std::uint32_t crc32_of(const std::uint8_t* data, std::size_t bytes, std::uint32_t crc) {
  crc = ~crc;
  for (std::size_t i = 0; i < bytes; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xedb88320u & (0u - (crc & 1u)));
  }
  return ~crc;
}

void append_big_endian(std::vector<std::uint8_t>& out, std::uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) {
    out.push_back(static_cast<std::uint8_t>(value >> shift));
  }
}

void append_chunk(std::vector<std::uint8_t>& out, const char* type,
                  const std::vector<std::uint8_t>& content) {
  append_big_endian(out, static_cast<std::uint32_t>(content.size()));
  const std::size_t start = out.size();
  out.insert(out.end(), type, type + 4);
  out.insert(out.end(), content.begin(), content.end());
  append_big_endian(out, crc32_of(out.data() + start, out.size() - start, 0));
}

/// Packs bytes as a zlib stream; stored, not compressed, where zlib is not built in.
std::vector<std::uint8_t> deflate_of(const std::vector<std::uint8_t>& raw) {
#ifdef FREEWHEEL_ZLIB
  uLongf size = compressBound(static_cast<uLong>(raw.size()));
  std::vector<std::uint8_t> packed(size);
  compress2(packed.data(), &size, raw.data(), static_cast<uLong>(raw.size()), 6);
  packed.resize(size);
  return packed;
#else
  std::vector<std::uint8_t> packed = {0x78, 0x01};
  std::uint32_t low = 1, high = 0;  // Adler-32
  for (std::size_t begin = 0; begin < raw.size(); begin += 65535) {
    const std::size_t count = std::min<std::size_t>(65535, raw.size() - begin);
    packed.push_back(begin + count == raw.size() ? 1 : 0);
    for (std::size_t value : {count, ~count}) {
      packed.push_back(static_cast<std::uint8_t>(value));
      packed.push_back(static_cast<std::uint8_t>(value >> 8));
    }
    packed.insert(packed.end(), raw.begin() + static_cast<std::ptrdiff_t>(begin),
                  raw.begin() + static_cast<std::ptrdiff_t>(begin + count));
  }
  for (std::uint8_t byte : raw) {
    low = (low + byte) % 65521;
    high = (high + low) % 65521;
  }
  append_big_endian(packed, (high << 16) | low);
  return packed;
#endif
}

}  // namespace

MappedFile::MappedFile(MappedFile&& other) noexcept : data_(other.data_), size_(other.size_) {
  other.data_ = nullptr;
  other.size_ = 0;
}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

Result<MappedFile> MappedFile::open(const std::string& path, Code code) {
  const char* hint = "check the path and its permissions";
  const int handle = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (handle < 0) return system_fault(code, path, "read", hint);
  struct stat info {};
  MappedFile mapped;
  Status status;
  if (::fstat(handle, &info) != 0) {
    status = system_fault(code, path, "read", hint);
  } else if (!S_ISREG(info.st_mode)) {
    status = Status(code, path, "is no file", hint);
  } else if (info.st_size > 0) {
    const auto size = static_cast<std::size_t>(info.st_size);
    // Copy on write: runtimes want writable memory, and nothing is written to it.
    void* data =
        ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, handle, 0);
    if (data == MAP_FAILED) {
      status = system_fault(code, path, "mapped", hint);
    } else {
      mapped.data_ = static_cast<std::uint8_t*>(data);
      mapped.size_ = size;
    }
  }
  ::close(handle);
  if (!status.ok()) return status;
  return mapped;
}

Result<std::string> read_text(const std::string& path, std::size_t limit, Code code) {
  FREEWHEEL_ASSIGN(const MappedFile file, MappedFile::open(path, code));
  if (file.size() > limit) {
    return Status(code, path, "is absurdly large (" + std::to_string(file.size()) + " bytes)",
                  "build the bundle again");
  }
  if (file.size() == 0) return std::string();
  return std::string(reinterpret_cast<const char*>(file.data()), file.size());
}

Result<SafetensorsFile> SafetensorsFile::open(const std::string& path, Code code) {
  const char* hint = "write the file again";
  FREEWHEEL_ASSIGN(MappedFile file, MappedFile::open(path, code));
  const auto damaged = [&](const std::string& where, const std::string& what) {
    return Status(code, where, what, hint);
  };
  std::uint64_t length = 0;
  if (file.size() >= sizeof length) std::memcpy(&length, file.data(), sizeof length);
  if (file.size() < sizeof length || length > kMaxHeaderBytes || length > file.size() - 8) {
    return damaged(path,
                   "is truncated or not safetensors (" + std::to_string(file.size()) + " bytes)");
  }
  const std::string text(reinterpret_cast<const char*>(file.data() + 8), length);
  auto header = parse_json(text, path, hint);
  if (!header.ok()) return damaged(path, "has a header that " + header.status().what());
  if (!header->is_object()) return damaged(path, "has a header that is no object");
  SafetensorsFile found;
  const std::size_t start = 8 + static_cast<std::size_t>(length);
  std::size_t end = start;
  for (const auto& [name, entry] : header->items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) return damaged(path, "has metadata that are no object");
      for (const auto& [key, value] : entry.items()) {
        if (value.is_string()) found.metadata[key] = value.get<std::string>();
      }
      continue;
    }
    Tensor tensor;
    const std::string fault = read_entry(entry, start, file, tensor);
    if (!fault.empty()) return damaged(path + ", tensor '" + name + "'", fault);
    end = std::max(
        end, static_cast<std::size_t>(tensor.as<std::uint8_t>() - file.data()) + tensor.bytes());
    found.tensors[name] = tensor;
  }
  if (end != file.size()) {
    return damaged(path, "has " + std::to_string(file.size()) + " bytes, its header says " +
                             std::to_string(end) + ": truncated");
  }
  found.file = std::move(file);
  return found;
}

Status write_safetensors(const std::string& path, const Tensors& tensors) {
  nlohmann::json header = nlohmann::json::object();
  std::size_t offset = 0;
  std::vector<Piece> pieces(2);
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", spelling_of(kSafetensorsDTypes, tensor.dtype)},
                    {"shape", std::vector<std::int64_t>(tensor.shape.begin(), tensor.shape.end())},
                    {"data_offsets", {offset, offset + tensor.bytes()}}};
    offset += tensor.bytes();
    pieces.push_back({tensor.data, tensor.bytes()});
  }
  std::string text = header.dump();
  text.append((kHeaderAlignment - (8 + text.size()) % kHeaderAlignment) % kHeaderAlignment, ' ');
  const std::uint64_t length = text.size();
  pieces[0] = {&length, sizeof length};
  pieces[1] = {text.data(), text.size()};
  return write_pieces(path, pieces);
}

Result<Buffer> read_npy(const std::string& path) {
  FREEWHEEL_ASSIGN(const MappedFile file, MappedFile::open(path, Code::kRequest));
  const auto refused = [&](const std::string& what) {
    return Status(Code::kRequest, path, what, "save it with numpy.save() as float32, C order");
  };
  static constexpr char kMagic[] = "\x93NUMPY";
  if (file.size() < 12 || std::memcmp(file.data(), kMagic, 6) != 0)
    return refused("is no .npy file");
  const bool is_long = file.data()[6] >= 2;
  const std::size_t prefix = is_long ? 12 : 10;
  std::size_t length = file.data()[8] | static_cast<std::size_t>(file.data()[9]) << 8;
  if (is_long) {
    length |= static_cast<std::size_t>(file.data()[10]) << 16 |
              static_cast<std::size_t>(file.data()[11]) << 24;
  }
  if (length > file.size() - prefix) return refused("is truncated");
  const std::string header(reinterpret_cast<const char*>(file.data() + prefix), length);
  const auto after = [&](const char* key) {
    const std::size_t at = header.find(key);
    return at == std::string::npos ? std::string() : header.substr(at + std::strlen(key));
  };
  const std::string descr = after("'descr': '"), order = after("'fortran_order': ");
  const std::string sizes = after("'shape': (");
  const DType* dtype = dtype_of(kNpyDTypes, descr.substr(0, descr.find('\'')));
  if (dtype == nullptr) return refused("has a dtype that is not read");
  if (order.compare(0, 5, "False") != 0) return refused("is in Fortran order");
  Shape shape;
  std::size_t bytes = item_bytes(*dtype);
  const char* at = sizes.c_str();
  while (*at >= '0' && *at <= '9') {
    char* next = nullptr;
    const auto size = static_cast<std::size_t>(std::strtoull(at, &next, 10));
    if (shape.rank() == Shape::kMaxRank || (size != 0 && bytes > file.size() / size)) {
      return refused("has an absurd shape");
    }
    bytes *= size;
    shape.push_back(static_cast<std::int64_t>(size));
    at = next;
    while (*at == ',' || *at == ' ') ++at;
  }
  if (file.size() - prefix - length != bytes) return refused("has a size that its shape denies");
  FREEWHEEL_ASSIGN(Buffer buffer, Buffer::create(host_memory(), *dtype, shape));
  if (bytes != 0) std::memcpy(buffer.view().data, file.data() + prefix + length, bytes);
  return buffer;
}

Status write_npy(const std::string& path, const Tensor& tensor) {
  const char* spelled = spelling_of(kNpyDTypes, tensor.dtype);
  if (spelled == nullptr) {
    return Status(Code::kOutput, path, std::string(".npy has no ") + dtype_name(tensor.dtype),
                  "write .safetensors");
  }
  std::string header =
      std::string("{'descr': '") + spelled + "', 'fortran_order': False, 'shape': (";
  for (std::int64_t size : tensor.shape) header += std::to_string(size) + ", ";
  header += "), }";
  header.append(63 - (10 + header.size()) % 64, ' ');
  header += '\n';
  std::string prefix("\x93NUMPY\x01\x00", 8);
  prefix += static_cast<char>(header.size() & 0xff);
  prefix += static_cast<char>(header.size() >> 8);
  return write_pieces(path, {{prefix.data(), prefix.size()},
                             {header.data(), header.size()},
                             {tensor.data, tensor.bytes()}});
}

Status write_png(const std::string& path, const std::uint8_t* pixels, std::int64_t height,
                 std::int64_t width) {
  const auto row = static_cast<std::size_t>(width) * 3;
  std::vector<std::uint8_t> raw;
  raw.reserve(static_cast<std::size_t>(height) * (row + 1));
  for (std::int64_t y = 0; y < height; ++y) {
    const std::uint8_t* line = pixels + static_cast<std::size_t>(y) * row;
    raw.push_back(0);  // no filter
    raw.insert(raw.end(), line, line + row);
  }
  std::vector<std::uint8_t> header;
  append_big_endian(header, static_cast<std::uint32_t>(width));
  append_big_endian(header, static_cast<std::uint32_t>(height));
  for (std::uint8_t byte : {8, 2, 0, 0, 0}) header.push_back(byte);  // 8 bits, RGB
  std::vector<std::uint8_t> out = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
  append_chunk(out, "IHDR", header);
  append_chunk(out, "IDAT", deflate_of(raw));
  append_chunk(out, "IEND", {});
  return write_bytes(path, out.data(), out.size());
}

Status write_bytes(const std::string& path, const void* data, std::size_t bytes) {
  return write_pieces(path, {{data, bytes}});
}

}  // namespace freewheel
