package sys

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// ErrNoCgroup2 says that no cgroup v2 hierarchy is in reach.
var ErrNoCgroup2 = errors.New("no cgroup v2 hierarchy is mounted")

// OwnCgroup2 is the directory of this process's cgroup in the v2 hierarchy.
func OwnCgroup2() (string, error) {
	mount, root, err := cgroup2()
	if err != nil {
		return "", err
	}
	table, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(table)) {
		own, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::")
		if !ok {
			continue
		}
		// A container may see only its own part of the hierarchy, mounted as if it were the whole.
		if own, ok = strings.CutPrefix(own, strings.TrimSuffix(root, "/")); !ok || own != "" && own[0] != '/' {
			return "", fmt.Errorf("cgroup %s lies outside of %s, which is what is mounted on %s", own, root, mount)
		}
		return filepath.Join(mount, own), nil
	}
	return "", ErrNoCgroup2
}

// cgroup2 finds the mount point, and which cgroup is mounted there.
func cgroup2() (mount, root string, err error) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(string(table)) {
		// 38 31 0:31 root mount options [optional fields] - type source options; see proc_pid_mountinfo(5)
		before, after, ok := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if ok && len(fields) >= 6 && strings.HasPrefix(after, "cgroup2 ") {
			return unescape(fields[4]), unescape(fields[3]), nil
		}
	}
	return "", "", ErrNoCgroup2
}

// unescape undoes the octal escapes of mountinfo, \040 for a space.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
