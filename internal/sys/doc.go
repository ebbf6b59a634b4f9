// Package sys holds every raw system call and constant of the project; nothing else imports golang.org/x/sys/unix.
// Its functions do one thing each and return errors that name the call.
package sys
