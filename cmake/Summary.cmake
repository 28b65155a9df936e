# jaxkern_summary(what [row...]): says what is built, after configuring and again after installing.
function(jaxkern_summary what)
  string(STRIP "jaxkern ${SKBUILD_PROJECT_VERSION}" name)
  set(lines "${name}: ${what}")
  if(JAXKERN_NVCC_ORIGIN)
    list(APPEND lines
      "  nvcc      ${CMAKE_CUDA_COMPILER_VERSION} (${JAXKERN_NVCC_ORIGIN})"
      "  code      ${CMAKE_CUDA_ARCHITECTURES}")
  endif()
  if(JAXKERN_KERNELS_ARCHIVE)
    list(APPEND lines "  archive   ${JAXKERN_KERNELS_ARCHIVE}")
  endif()
  foreach(row IN LISTS ARGN)
    list(APPEND lines "  compiled  ${row}")
  endforeach()
  list(JOIN lines "\n-- " text)
  message(STATUS "${text}\n")
  install(CODE "message(STATUS [==[${text}\n]==])" COMPONENT jaxkern)
endfunction()
