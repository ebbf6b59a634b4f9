package intercept

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/berth-net/berth/internal/sys"
)

// registration is one line of an epoll descriptor's fdinfo (ep_show_fdinfo, fs/eventpoll.c).
type registration struct {
	epoll  int // the epoll's descriptor in its process
	fd     int // tfd: the number under which the file was added
	events uint32
	data   uint64
	ino    uint64
	dev    uint64 // as in struct stat
}

// registrations are those of the caller's socket in the epolls that its process has open.
func (c *Call) registrations() ([]registration, error) {
	st, err := c.stat()
	if err != nil {
		return nil, err
	}
	found, err := findRegistrations(c.proc(""), c.FD, st.Ino, st.Dev)
	return found, c.lookedUp(err)
}

// findRegistrations looks through the epolls of the process under proc.
func findRegistrations(proc string, fd int, ino, dev uint64) ([]registration, error) {
	fds, err := os.ReadDir(proc + "fd")
	if err != nil {
		return nil, err
	}
	var found []registration
	for _, entry := range fds {
		link, err := os.Readlink(proc + "fd/" + entry.Name())
		var info []byte
		if err == nil && link == "anon_inode:[eventpoll]" {
			info, err = os.ReadFile(proc + "fdinfo/" + entry.Name())
		}
		if errors.Is(err, fs.ErrNotExist) {
			continue // another thread closed it
		}
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(info)) {
			r, ok, err := parseRegistration(line)
			if err != nil {
				return nil, err
			}
			// Two files can be there under one number: the earlier one lives on in another descriptor.
			if ok && r.fd == fd && r.ino == ino && r.dev == dev {
				if r.epoll, err = strconv.Atoi(entry.Name()); err != nil {
					return nil, err
				}
				found = append(found, r)
			}
		}
	}
	return found, nil
}

// parseRegistration reads a line such as "tfd:        5 events:       19 data:                5  pos:0 ino:1f2e sdev:8"; ok is false for any other line.
func parseRegistration(line string) (r registration, ok bool, err error) {
	if !strings.HasPrefix(line, "tfd:") {
		return r, false, nil
	}
	var pos int64
	if _, err := fmt.Sscanf(line, "tfd: %d events: %x data: %x pos:%d ino:%x sdev:%x", &r.fd, &r.events, &r.data, &pos, &r.ino, &r.dev); err != nil {
		return r, false, fmt.Errorf("fdinfo of an epoll: %q: %w", strings.TrimSpace(line), err)
	}
	r.dev = sys.StatDev(r.dev)
	return r, true, nil
}
