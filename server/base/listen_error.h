// Why nothing can listen on an address, for whoever was told no more than that it failed.
#pragma once

#include <string>

namespace altiplano {

// address: HOST:PORT or unix:/path. Tries it, and says what the system answers and what to do about it: "Address
// already in use: end what listens there, or name another port". Resolves names, so it may take seconds.
std::string WhyNotListening(const std::string& address);

}  // namespace altiplano
