// Why nothing can listen on an address, for whoever was told no more than that it failed.
#pragma once

#include <string>
#include <string_view>

namespace altiplano {

// How the address of a unix socket begins, and the path of such a one, which gRPC lets begin with two slashes more.
inline constexpr std::string_view kUnixAddress = "unix:";
std::string_view UnixSocketPath(std::string_view address);

// address: HOST:PORT or unix:/path. Tries it, and says what the system answers and what to do about it: "Address
// already in use: end what listens there, or name another port". Resolves names, so it may take seconds.
std::string WhyNotListening(const std::string& address);

}  // namespace altiplano
