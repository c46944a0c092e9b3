// Function calls in Python syntax with literal arguments, as ast.literal_eval would read them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "server/text/python_json.h"

namespace altiplano {

struct PythonCall {
  std::string name;   // "f", "module.f"; also with '-', which tools may have in their names
  PyValue arguments;  // a dict: keyword arguments only
};

// "[f(a=1), g(b='x')]" and blanks around it. False when it is anything else: an empty list, positional arguments,
// variables, nested calls. Nothing is evaluated. One pass, no backtracking; nesting at most kMaxJsonDepth.
bool ParsePythonCallList(std::string_view text, std::vector<PythonCall>* calls);

// "f.call(query="x")": the arguments of one call to a built-in tool. False as above.
bool ParsePythonBuiltinCall(std::string_view text, PythonCall* call);

}  // namespace altiplano
