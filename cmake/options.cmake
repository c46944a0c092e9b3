# Flags that everything of ours is compiled with.
find_package(Threads REQUIRED)

add_library(altiplano_options INTERFACE)
target_include_directories(altiplano_options INTERFACE ${CMAKE_SOURCE_DIR})
target_link_libraries(altiplano_options INTERFACE Threads::Threads)
# -g1 keeps line numbers for crash reports. The baseline is AVX2-class machines; faster paths are chosen at run time.
target_compile_options(altiplano_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual
    -fno-omit-frame-pointer -g1 -fstack-protector-strong>
  # No fused multiply-add where the source does not ask for one: results must not depend on the optimiser.
  $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)
target_link_options(altiplano_options INTERFACE -Wl,-z,relro,-z,now)
# GCC 12 reports false dangling and overflow warnings inside libstdc++ when it inlines std::string at -O3.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(altiplano_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict -Wno-stringop-overflow -Wno-array-bounds -Wno-maybe-uninitialized>)
endif()

if(ALTIPLANO_SANITIZE)
  target_compile_options(altiplano_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${ALTIPLANO_SANITIZE} -fno-sanitize-recover=all -O1>)
  target_link_options(altiplano_options INTERFACE -fsanitize=${ALTIPLANO_SANITIZE})
else()
  target_compile_definitions(altiplano_options INTERFACE $<$<CONFIG:Release>:_FORTIFY_SOURCE=2>)
endif()
if(ALTIPLANO_FUZZ)
  target_compile_options(altiplano_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=fuzzer-no-link>)
endif()
