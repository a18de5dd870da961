# SPDX-License-Identifier: Apache-2.0
# Writes the ABI description of LIBRARY to OUT, without anything of the machine it was made on.
execute_process(COMMAND "${ABIDW}" --headers-dir "${ROOT}/include" --drop-private-types
  --exported-interfaces-only --no-elf-needed --no-corpus-path --no-comp-dir-path --no-show-locs
  --out-file "${OUT}" "${LIBRARY}" COMMAND_ERROR_IS_FATAL ANY)
file(READ "${OUT}" text)
string(REPLACE "${ROOT}/" "" text "${text}")
file(WRITE "${OUT}" "${text}")
