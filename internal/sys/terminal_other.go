//go:build !linux

package sys

import "os"

// IsTerminal reports whether the file is a character device, of which a terminal is by far the most likely.
func IsTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
