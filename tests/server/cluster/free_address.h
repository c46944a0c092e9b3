#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <random>
#include <string>

#include "server/base/strings.h"

namespace altiplano::cluster {

// A port that was free a moment ago, and not one of those that systems give out for port 0: a server that asks for any
// would now and then get it before the one that it is meant for.
inline std::string FreeAddress() {
  std::random_device random;
  for (int attempt = 0; attempt < 1000; ++attempt) {
    const auto port = static_cast<uint16_t>(10000 + random() % 20000);
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    at.sin_port = htons(port);
    const bool free = bind(fd, reinterpret_cast<sockaddr*>(&at), sizeof at) == 0;
    close(fd);
    if (free) return StrCat("127.0.0.1:", port);
  }
  ADD_FAILURE() << "no free port between 10000 and 30000";
  return "127.0.0.1:0";
}

}  // namespace altiplano::cluster
