# The static library of kernels, which knows no Python, and the module that calls it.

# jaxkern_kernel(family source [FAST_MATH] [DEFINE name=value...])
#
# Compiles cuda/<family>/<source> once. One source may appear in several rows with different
# definitions: that is how a kernel gets its instances.
function(jaxkern_kernel family source)
  cmake_parse_arguments(PARSE_ARGV 2 arg "FAST_MATH" "" "DEFINE")
  list(JOIN ARGN " " flags)
  set(row "${family}/${source} ${flags}")
  string(STRIP "${row}" row)
  set_property(GLOBAL APPEND PROPERTY JAXKERN_KERNEL_ROWS "${row}")
  if(JAXKERN_KERNELS_ARCHIVE)
    return()
  endif()
  string(MAKE_C_IDENTIFIER "jaxkern_${row}" object)
  add_library(${object} OBJECT ${PROJECT_SOURCE_DIR}/cuda/${family}/${source})
  target_compile_definitions(${object} PRIVATE ${arg_DEFINE})
  target_include_directories(${object} PRIVATE ${PROJECT_SOURCE_DIR})
  target_include_directories(${object} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  # NOTE: -std by hand, because CMake 3.25 knows no C++20 for CUDA.
  target_compile_options(${object} PRIVATE -std=c++20
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra -Xptxas=-v,--warn-on-spills
      -Xfatbin=-compress-all -lineinfo>
    $<$<AND:$<BOOL:${arg_FAST_MATH}>,$<COMPILE_LANGUAGE:CUDA>>:--use_fast_math>)
  jaxkern_target_defaults(${object})
  set_property(GLOBAL APPEND PROPERTY JAXKERN_KERNEL_OBJECTS $<TARGET_OBJECTS:${object}>)
endfunction()

function(jaxkern_target_defaults target)
  set_target_properties(${target} PROPERTIES
    COMPILE_WARNING_AS_ERROR ON
    POSITION_INDEPENDENT_CODE ON
    CXX_VISIBILITY_PRESET hidden
    CUDA_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
endfunction()

# Gathers the rows above into the target jaxkern_kernels (or takes the archive that is given) and
# hands the rows to the caller as JAXKERN_KERNEL_ROWS.
function(jaxkern_kernel_library)
  if(JAXKERN_KERNELS_ARCHIVE)
    add_library(jaxkern_kernels STATIC IMPORTED)
    set_target_properties(jaxkern_kernels PROPERTIES IMPORTED_LOCATION ${JAXKERN_KERNELS_ARCHIVE})
  else()
    get_property(objects GLOBAL PROPERTY JAXKERN_KERNEL_OBJECTS)
    add_library(jaxkern_kernels STATIC ${objects})
    set_target_properties(jaxkern_kernels PROPERTIES LINKER_LANGUAGE CXX)
  endif()
  target_link_libraries(jaxkern_kernels INTERFACE CUDA::cudart_static)
  get_property(rows GLOBAL PROPERTY JAXKERN_KERNEL_ROWS)
  set(JAXKERN_KERNEL_ROWS ${rows} PARENT_SCOPE)
endfunction()

# What a line of Python prints.
function(jaxkern_ask_python result line)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${line}" OUTPUT_VARIABLE answer
    OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(${result} "${answer}" PARENT_SCOPE)
endfunction()

# jaxkern_python_module(family...): jaxkern/_C from cuda/ffi/module.cc and cuda/ffi/<family>.cc.
function(jaxkern_python_module)
  find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module
    OPTIONAL_COMPONENTS Development.SABIModule)
  jaxkern_ask_python(nanobind_DIR "import nanobind; print(nanobind.cmake_dir())")
  find_package(nanobind CONFIG REQUIRED)
  jaxkern_ask_python(xla_headers
    "import jaxlib, pathlib; print(pathlib.Path(jaxlib.__file__).parent / 'include')")
  list(TRANSFORM ARGN REPLACE "(.+)" "cuda/ffi/\\1.cc" OUTPUT_VARIABLE handlers)
  nanobind_add_module(_C STABLE_ABI NB_STATIC NB_SUPPRESS_WARNINGS cuda/ffi/module.cc ${handlers})
  target_include_directories(_C PRIVATE ${PROJECT_SOURCE_DIR})
  target_include_directories(_C SYSTEM PRIVATE ${xla_headers})
  target_compile_options(_C PRIVATE -Wall -Wextra)
  target_compile_definitions(_C PRIVATE
    JAXKERN_NVCC_ORIGIN="${JAXKERN_NVCC_ORIGIN}" JAXKERN_CUDA_ARCHS="${CMAKE_CUDA_ARCHITECTURES}")
  target_link_libraries(_C PRIVATE jaxkern_kernels)
  target_link_options(_C PRIVATE -Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/exports.map)
  jaxkern_target_defaults(_C)
  set_target_properties(_C PROPERTIES CXX_STANDARD 20 CXX_EXTENSIONS OFF
    LINK_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/exports.map)
  install(TARGETS _C LIBRARY DESTINATION jaxkern COMPONENT jaxkern)
endfunction()
