//go:build linux

package supervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// FindCommand finds a command's executable as a shell would that has changed to dir and set env.
func FindCommand(name, dir string, env []string) (string, error) {
	if name == "" {
		return "", errors.New("the command is empty")
	}
	in := func(path string) string {
		if filepath.IsAbs(path) || dir == "" {
			return path
		}
		return filepath.Join(dir, path)
	}
	if strings.Contains(name, "/") {
		return name, executable(name, in(name))
	}
	path := os.Getenv("PATH")
	for _, kv := range env {
		if value, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = value
		}
	}
	var found error
	for _, folder := range filepath.SplitList(path) {
		if folder == "" {
			folder = "."
		}
		file := filepath.Join(folder, name)
		err := executable(name, in(file))
		if err == nil {
			return file, nil
		}
		if found == nil && !errors.Is(err, fs.ErrNotExist) {
			found = err
		}
	}
	if found != nil {
		return "", found
	}
	return "", fmt.Errorf("the command %q is in no folder of PATH: %w", name, fs.ErrNotExist)
}

func executable(name, path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("the command %q does not exist: %w", name, fs.ErrNotExist)
	case err != nil:
		return fmt.Errorf("the command %q: %w", name, err)
	case info.IsDir():
		return fmt.Errorf("the command %q is a folder: %w", name, fs.ErrPermission)
	case syscall.Access(path, 1 /* X_OK */) != nil:
		return fmt.Errorf("the command %q is not executable: %w", name, fs.ErrPermission)
	}
	return nil
}

// quote writes a command so that a shell would read it again.
func quote(command []string) string {
	quoted := make([]string, len(command))
	for i, arg := range command {
		if arg != "" && !strings.ContainsFunc(arg, func(r rune) bool {
			return !strings.ContainsRune("-_./:=,@%+", r) && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
		}) {
			quoted[i] = arg
			continue
		}
		quoted[i] = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}
