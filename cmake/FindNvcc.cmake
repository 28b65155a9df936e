# Chooses the CUDA compiler before CMake looks for one.
#
# Order: an explicit CMAKE_CUDA_COMPILER, CUDACXX, nvcc in PATH, /usr/local/cuda, and last the PyPI wheels
# (nvidia-cuda-nvcc and its friends) installed beside the Python that builds. Sets
#   JAXKERN_NVCC_ORIGIN   "system" or "PyPI"; empty when there is no nvcc
#   JAXKERN_NVCC_HINT     what to do in that case

set(JAXKERN_NVCC_ORIGIN "")
set(JAXKERN_NVCC_HINT "Install the CUDA toolkit, set CUDACXX, or let pip build in its isolated environment.")

function(jaxkern_find_system_nvcc result)
  if(CMAKE_CUDA_COMPILER)
    set(nvcc ${CMAKE_CUDA_COMPILER})
  elseif(DEFINED ENV{CUDACXX})
    set(nvcc $ENV{CUDACXX})
  else()
    find_program(JAXKERN_SYSTEM_NVCC nvcc NO_CMAKE_PATH NO_CMAKE_ENVIRONMENT_PATH
      PATHS /usr/local/cuda/bin)
    mark_as_advanced(JAXKERN_SYSTEM_NVCC)
    set(nvcc ${JAXKERN_SYSTEM_NVCC})
  endif()
  set(${result} ${nvcc} PARENT_SCOPE)
endfunction()

function(jaxkern_find_pypi_toolkit result)
  find_package(Python 3.11 COMPONENTS Interpreter)
  set(root "")
  if(Python_FOUND)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import importlib.util as u; print(*u.find_spec('nvidia.cu13').submodule_search_locations)"
      OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(NOT EXISTS "${root}/bin/nvcc")
    set(root "")
  endif()
  set(${result} "${root}" PARENT_SCOPE)
endfunction()

if(NOT JAXKERN_NVCC STREQUAL "PYPI")
  jaxkern_find_system_nvcc(system_nvcc)
  if(system_nvcc)
    set(CMAKE_CUDA_COMPILER ${system_nvcc})
    set(JAXKERN_NVCC_ORIGIN "system")
  endif()
endif()

if(NOT JAXKERN_NVCC_ORIGIN AND NOT JAXKERN_NVCC STREQUAL "SYSTEM")
  jaxkern_find_pypi_toolkit(toolkit)
  if(toolkit)
    set(CMAKE_CUDA_COMPILER ${toolkit}/bin/nvcc)
    set(CUDAToolkit_ROOT ${toolkit})
    # NOTE: the wheels keep libraries in lib/, where nvcc.profile says lib64/, and ship no
    # libcudart.so for FindCUDAToolkit to see.
    string(APPEND CMAKE_CUDA_FLAGS " -L${toolkit}/lib")
    set(CUDA_CUDART ${toolkit}/lib/libcudart.so.13 CACHE FILEPATH "" FORCE)
    set(JAXKERN_NVCC_ORIGIN "PyPI")
  endif()
endif()
