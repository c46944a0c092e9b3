# One library per folder, one test program per folder: a new file is built because it is there.

# A file takes most of its time for headers, and for inline functions that other files compile too. Only release is built
# with ALTIPLANO_UNITY; where it is off, a file cannot lean on what another includes.
function(altiplano_several_at_once name)
  set_target_properties(${name} PROPERTIES UNITY_BUILD ${ALTIPLANO_UNITY} UNITY_BUILD_BATCH_SIZE 8)
  if(ALTIPLANO_UNITY AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # It takes a .cc among others for a header, whose classes should have no members of an unnamed namespace.
    target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wno-subobject-linkage>)
  endif()
endfunction()

# altiplano_library(NAME DIR sources' folder  DEPS ...)
function(altiplano_library name)
  cmake_parse_arguments(ARG "" "DIR" "DEPS;PRIVATE_DEPS;EXCLUDE" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${ARG_DIR}/*.cc)
  foreach(pattern IN LISTS ARG_EXCLUDE)
    list(FILTER sources EXCLUDE REGEX ${pattern})
  endforeach()
  if(sources)
    add_library(${name} STATIC ${sources})
    target_link_libraries(${name} PUBLIC altiplano_options ${ARG_DEPS} PRIVATE ${ARG_PRIVATE_DEPS})
    altiplano_several_at_once(${name})
  else()
    add_library(${name} INTERFACE)
    target_link_libraries(${name} INTERFACE altiplano_options ${ARG_DEPS})
  endif()
endfunction()

# altiplano_test(NAME  DIR folder  DEPS ...  [EXCLUDE regex...]  [LABELS slow|long]): every *_test.cc of the folder in one gtest
# program.
function(altiplano_test name)
  cmake_parse_arguments(ARG "" "DIR;TIMEOUT" "DEPS;LABELS;ENVIRONMENT;EXCLUDE" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS ${ARG_DIR}/*_test.cc ${ARG_DIR}/*_testlib.cc)
  foreach(pattern IN LISTS ARG_EXCLUDE)
    list(FILTER sources EXCLUDE REGEX ${pattern})
  endforeach()
  if(NOT sources)
    return()
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  if(ALTIPLANO_SANITIZE)
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 10")
  endif()
  add_executable(${name} ${sources} ${CMAKE_SOURCE_DIR}/tests/temp_folder_testlib.cc)
  target_link_libraries(${name} PRIVATE altiplano_options ${ARG_DEPS} GTest::gmock GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE
    ALTIPLANO_SOURCE_DIR="${CMAKE_SOURCE_DIR}" ALTIPLANO_BINARY_DIR="${CMAKE_BINARY_DIR}"
    ALTIPLANO_DATA_DIR="${ALTIPLANO_DATA_DIR}")
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}" ENVIRONMENT "${ARG_ENVIRONMENT}")
endfunction()

# altiplano_fuzzer(NAME  SOURCE file  CORPUS folder  DEPS ...): with libFuzzer when ALTIPLANO_FUZZ is on; otherwise a
# program that replays the corpus once, as an ordinary test. The target "fuzzers" is all of them.
function(altiplano_fuzzer name)
  cmake_parse_arguments(ARG "" "SOURCE;CORPUS" "DEPS" ${ARGN})
  if(ALTIPLANO_FUZZ)
    add_executable(${name} ${ARG_SOURCE})
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    add_dependencies(fuzzers ${name})
  else()
    add_executable(${name} ${ARG_SOURCE} ${CMAKE_SOURCE_DIR}/tests/fuzz/replay_main.cc)
    add_test(NAME ${name}_corpus COMMAND ${name} ${ARG_CORPUS})
    set_tests_properties(${name}_corpus PROPERTIES TIMEOUT 120)
  endif()
  target_link_libraries(${name} PRIVATE altiplano_options ${ARG_DEPS})
endfunction()
