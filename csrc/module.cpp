// The Python module that carries the operators: importing it loads the library, whose static
// initialisers register the kernels with the torch dispatcher. Nothing else is in it.

#include <Python.h>

#define FASTMETA_STR_(x) #x
#define FASTMETA_STR(x) FASTMETA_STR_(x)
#define FASTMETA_INIT_(x) PyInit_##x
#define FASTMETA_INIT(x) FASTMETA_INIT_(x)

PyMODINIT_FUNC FASTMETA_INIT(FASTMETA_MODULE)(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   FASTMETA_STR(FASTMETA_MODULE),
                                   nullptr,
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
